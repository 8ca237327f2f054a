"""SANM (Self-supervised Adversarial Noisy Masking, CVPR 2023) and noisy-label methods on Lightning."""

from sanm_lightning._version import __version__
from sanm_lightning.batch import NoisyBatch
from sanm_lightning.data import CIFAR10, CIFAR100, CSVImages, Digits, FromDataset, ImageFolder, Noise, NoisyDataModule
from sanm_lightning.methods import (
    C2D,
    CDR,
    ELR,
    SSR,
    CoTeaching,
    CrossEntropy,
    DivideMix,
    ELRPlus,
    NoisyLabelModule,
    SimCLR,
)
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM

__all__ = [
    "C2D",
    "CDR",
    "CIFAR10",
    "CIFAR100",
    "ELR",
    "SANM",
    "SSR",
    "CSVImages",
    "CoTeaching",
    "CrossEntropy",
    "Digits",
    "DivideMix",
    "ELRPlus",
    "FromDataset",
    "ImageFolder",
    "Noise",
    "NoisyBatch",
    "NoisyDataModule",
    "NoisyLabelModule",
    "SANMCallback",
    "SANMMixin",
    "SimCLR",
    "__version__",
]
