"""One file, one paper, one class."""

from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.cross_entropy import CrossEntropy
from sanm_lightning.methods.schedules import Cosine, OneCycle

__all__ = ["Cosine", "CrossEntropy", "NoisyLabelModule", "OneCycle"]
