"""Data sets, label noise, and loaders that resume."""

from sanm_lightning.data.animal10n import Animal10N
from sanm_lightning.data.cifar import CIFAR10, CIFAR100
from sanm_lightning.data.cifar_n import CIFAR10N, CIFAR100N
from sanm_lightning.data.clothing1m import Clothing1M
from sanm_lightning.data.csv_images import CSVImages
from sanm_lightning.data.datamodule import NoisyDataModule
from sanm_lightning.data.digits import Digits
from sanm_lightning.data.food101n import Food101N
from sanm_lightning.data.from_dataset import FromDataset
from sanm_lightning.data.image_folder import ImageFolder
from sanm_lightning.data.loader import IndexLoader
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.toy import Toy
from sanm_lightning.data.webvision import WebVision

__all__ = [
    "CIFAR10",
    "CIFAR10N",
    "CIFAR100",
    "CIFAR100N",
    "Animal10N",
    "CSVImages",
    "Clothing1M",
    "Digits",
    "Food101N",
    "FromDataset",
    "ImageFolder",
    "IndexLoader",
    "Noise",
    "NoisyDataModule",
    "Toy",
    "WebVision",
]
