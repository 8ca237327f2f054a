"""SANM: equations as pure functions, the module, and a callback and a mixin that apply it to any LightningModule."""

from sanm_lightning.functional import Mixture, clean_probability, fit_mixture, mixture_posterior
from sanm_lightning.sanm.activation import class_activation_map, energy_map
from sanm_lightning.sanm.feature_extractor import FeatureExtractor
from sanm_lightning.sanm.feature_quality import AuditQuality, CombinedQuality, FeatureQuality
from sanm_lightning.sanm.labels import regularize_labels
from sanm_lightning.sanm.masking import apply_mask, mask_box, mask_ratio, masked_fraction
from sanm_lightning.sanm.module import SANM, FrozenNetwork, Views
from sanm_lightning.sanm.quality import LabelQuality, QualityEstimator, QualityFile
from sanm_lightning.sanm.reconstruction import Decoder, reconstruction_loss

__all__ = [
    "SANM",
    "AuditQuality",
    "CombinedQuality",
    "Decoder",
    "FeatureExtractor",
    "FeatureQuality",
    "FrozenNetwork",
    "LabelQuality",
    "Mixture",
    "QualityEstimator",
    "QualityFile",
    "Views",
    "apply_mask",
    "class_activation_map",
    "clean_probability",
    "energy_map",
    "fit_mixture",
    "mask_box",
    "mask_ratio",
    "masked_fraction",
    "mixture_posterior",
    "reconstruction_loss",
    "regularize_labels",
]
