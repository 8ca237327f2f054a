"""Losses of the methods, pure, from logits; per sample where a method weights or selects samples."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "clamped_probs",
    "early_learning_regularization",
    "feature_consistency",
    "generalized_cross_entropy",
    "label_margin",
    "masked_mean",
    "mixmatch_loss",
    "negative_entropy",
    "nt_xent",
    "prior_kl",
    "soft_cross_entropy",
]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, logits (B, C), class probabilities (B, C) -> (B,) float32, >= 0."""
    return -(targets.float() * logits.float().log_softmax(1)).sum(1)


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Generalized cross-entropy of each sample, between cross-entropy (q -> 0) and mean absolute error (q = 1).

    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 6: (1 - p_y^q) / q, here with the expectation of p^q over soft targets.
    The power is taken of the log-probability, so that the gradient stays finite as p_y goes to 0.

    Args:
        logits: shape (B, C).
        targets: class probabilities, shape (B, C).
        q: in (0, 1].

    Returns:
        Shape (B,), float32, in [0, 1 / q].

    Raises:
        ValueError: if ``q`` is out of its range.
    """
    if not 0 < q <= 1:
        raise ValueError(f"expected q in (0, 1], got {q}; use cross-entropy for q = 0")
    powers = (q * logits.float().log_softmax(1)).exp()
    return (targets.float() * (1 - powers)).sum(1) / q


def masked_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean of ``values`` (B,), a scalar; 0 where all weights are 0.

    Args:
        values: shape (B,).
        weight: shape (B,), non-negative or bool; None weights all alike.
    """
    if weight is None:
        return values.mean()
    weight = weight.to(values.dtype)
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def label_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Largest other logit minus that of the label, logits (B, C), targets (B, C) -> (B,) float32.

    Source: Pleiss et al., NeurIPS 2020, "area under the margin", with the opposite sign, so that it ranks as a loss does.
    """
    logits = logits.float()
    label = targets.argmax(1, keepdim=True)
    others = logits.scatter(1, label, float("-inf"))
    return others.amax(1) - logits.gather(1, label).squeeze(1)


def negative_entropy(logits: Tensor) -> Tensor:
    """Mean of sum p log p over a batch of logits (B, C): a scalar <= 0, smallest for uniform predictions."""
    log_probs = logits.float().log_softmax(1)
    return (log_probs.exp() * log_probs).sum(1).mean()


def prior_kl(logits: Tensor) -> Tensor:
    """KL divergence of the mean prediction of a batch, logits (B, C), from the uniform prior: a scalar >= 0."""
    mean = logits.float().softmax(1).mean(0)
    prior = 1 / logits.shape[1]
    return (prior * (math.log(prior) - mean.clamp(min=1e-12).log())).sum()


def mixmatch_loss(logits: Tensor, targets: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Return DivideMix's Eq. 8 and 9: cross-entropy of the labelled rows, squared error of the others.

    Source: Li et al., ICLR 2020.

    Args:
        logits: of mixed images, shape (V, C).
        targets: mixed targets, shape (V, C).
        labelled: whether a row comes from the labelled set, shape (V,), bool.

    Returns:
        Two scalars: the mean cross-entropy, and the squared error, mean over rows and classes. 0 where there is no row.
    """
    squared_error = (logits.float().softmax(1) - targets).square().mean(1)
    return masked_mean(soft_cross_entropy(logits, targets), labelled), masked_mean(squared_error, ~labelled)


def clamped_probs(logits: Tensor) -> Tensor:
    """Logits (B, C) -> probabilities (B, C) float32 within [1e-4, 1 - 1e-4], so that log(1 - <t, p>) stays finite."""
    return logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)


def early_learning_regularization(probs: Tensor, targets: Tensor) -> Tensor:
    """Mean of log(1 - <t, p>): probabilities (B, C) with gradient, targets (B, C) without -> a scalar <= 0.

    Source: Liu et al., NeurIPS 2020, Eq. 6. The value is negative, and falls without bound as p approaches t.
    """
    return (1 - (probs * targets.detach()).sum(1)).log().mean()


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy: each of the 2 B views is to find its partner among the others.

    Source: Chen et al., ICML 2020, Eq. 1.

    Args:
        one: projections of the first views, shape (B, P).
        other: of the second views of the same images, shape (B, P).
        temperature: positive.

    Returns:
        A scalar, the mean over all 2 B views.
    """
    views = F.normalize(torch.cat([one, other]).float(), dim=1)
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf"))
    partner = torch.arange(len(views), device=views.device).roll(len(one))
    return F.cross_entropy(similarity, partner)


def feature_consistency(predicted: Tensor, target: Tensor) -> Tensor:
    """Negative mean cosine similarity of (B, P) predictions with (B, P) targets that get no gradient: a scalar in [-1, 1]."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=1).mean()
