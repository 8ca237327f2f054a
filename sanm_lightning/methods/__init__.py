"""One file, one paper, one class."""

from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.c2d import C2D
from sanm_lightning.methods.cdr import CDR
from sanm_lightning.methods.co_teaching import CoTeaching
from sanm_lightning.methods.cross_entropy import CrossEntropy
from sanm_lightning.methods.dividemix import DivideMix
from sanm_lightning.methods.elr import ELR
from sanm_lightning.methods.elr_plus import ELRPlus
from sanm_lightning.methods.schedules import Cosine, LinearAfter, OneCycle
from sanm_lightning.methods.simclr import SimCLR
from sanm_lightning.methods.ssr import SSR
from sanm_lightning.methods.two_networks import TwoNetworks

__all__ = [
    "C2D",
    "CDR",
    "ELR",
    "SSR",
    "CoTeaching",
    "Cosine",
    "CrossEntropy",
    "DivideMix",
    "ELRPlus",
    "LinearAfter",
    "NoisyLabelModule",
    "OneCycle",
    "SimCLR",
    "TwoNetworks",
]
