"""Data sets, label noise, and loaders that resume."""

from sanm_lightning.data.cifar import CIFAR10, CIFAR100
from sanm_lightning.data.csv_images import CSVImages
from sanm_lightning.data.datamodule import NoisyDataModule
from sanm_lightning.data.digits import Digits
from sanm_lightning.data.from_dataset import FromDataset
from sanm_lightning.data.image_folder import ImageFolder
from sanm_lightning.data.loader import IndexLoader
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.toy import Toy

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CSVImages",
    "Digits",
    "FromDataset",
    "ImageFolder",
    "IndexLoader",
    "Noise",
    "NoisyDataModule",
    "Toy",
]
