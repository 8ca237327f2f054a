"""Losses, selections and schedules of the methods as pure functions."""

from sanm_lightning.functional.losses import (
    clamped_probs,
    early_learning_regularization,
    feature_consistency,
    generalized_cross_entropy,
    label_margin,
    masked_mean,
    mixmatch_loss,
    negative_entropy,
    nt_xent,
    prior_kl,
    soft_cross_entropy,
)
from sanm_lightning.functional.mixture import Mixture, clean_probability, fit_mixture, mixture_posterior
from sanm_lightning.functional.neighbors import balanced_votes, knn_vote, nearest_neighbors
from sanm_lightning.functional.ramps import critical_fraction, ema_decay, forget_rate, linear_ramp, sigmoid_ramp
from sanm_lightning.functional.selection import (
    class_balanced_draw,
    critical_threshold,
    members_by_class,
    relabel,
    repeated_draw,
    small_loss,
    threshold_split,
)
from sanm_lightning.functional.targets import Mixed, co_refine, mixup, sharpen

__all__ = [
    "Mixed",
    "Mixture",
    "balanced_votes",
    "clamped_probs",
    "class_balanced_draw",
    "clean_probability",
    "co_refine",
    "critical_fraction",
    "critical_threshold",
    "early_learning_regularization",
    "ema_decay",
    "feature_consistency",
    "fit_mixture",
    "forget_rate",
    "generalized_cross_entropy",
    "knn_vote",
    "label_margin",
    "linear_ramp",
    "masked_mean",
    "members_by_class",
    "mixmatch_loss",
    "mixture_posterior",
    "mixup",
    "nearest_neighbors",
    "negative_entropy",
    "nt_xent",
    "prior_kl",
    "relabel",
    "repeated_draw",
    "sharpen",
    "sigmoid_ramp",
    "small_loss",
    "soft_cross_entropy",
    "threshold_split",
]
