"""One file, one paper, one class."""

from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.cross_entropy import CrossEntropy
from sanm_lightning.methods.dividemix import DivideMix
from sanm_lightning.methods.schedules import Cosine, OneCycle
from sanm_lightning.methods.two_networks import TwoNetworks

__all__ = ["Cosine", "CrossEntropy", "DivideMix", "NoisyLabelModule", "OneCycle", "TwoNetworks"]
