"""SANM (Self-supervised Adversarial Noisy Masking, CVPR 2023) and noisy-label methods on Lightning."""

from sanm_lightning._version import __version__
from sanm_lightning.batch import NoisyBatch
from sanm_lightning.data import (
    CIFAR10,
    CIFAR10N,
    CIFAR100,
    CIFAR100N,
    Animal10N,
    Clothing1M,
    CSVImages,
    Digits,
    Food101N,
    FromDataset,
    ImageFolder,
    Noise,
    NoisyDataModule,
    WebVision,
)
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
    "CIFAR10N",
    "CIFAR100",
    "CIFAR100N",
    "ELR",
    "SANM",
    "SSR",
    "Animal10N",
    "CSVImages",
    "Clothing1M",
    "CoTeaching",
    "CrossEntropy",
    "Digits",
    "DivideMix",
    "ELRPlus",
    "Food101N",
    "FromDataset",
    "ImageFolder",
    "Noise",
    "NoisyBatch",
    "NoisyDataModule",
    "NoisyLabelModule",
    "SANMCallback",
    "SANMMixin",
    "SimCLR",
    "WebVision",
    "__version__",
]
