"""Networks of the papers, registered with timm, and normalization as the first layer of a network."""

from sanm_lightning.models import resnet_cifar  # noqa: F401  # registers its networks with timm
from sanm_lightning.models.checkpoints import LoadReport, load_weights
from sanm_lightning.models.cnn9 import CNN9
from sanm_lightning.models.normalized import Normalized, create_network, with_image_size
from sanm_lightning.models.pooled import pooled_features, pooled_width
from sanm_lightning.models.preact_resnet import PreActResNet
from sanm_lightning.models.pretrained import load_pretrained
from sanm_lightning.models.projection import Expansion, Projection
from sanm_lightning.models.small_cnn import SmallCNN

__all__ = [
    "CNN9",
    "Expansion",
    "LoadReport",
    "Normalized",
    "PreActResNet",
    "Projection",
    "SmallCNN",
    "create_network",
    "load_pretrained",
    "load_weights",
    "pooled_features",
    "pooled_width",
    "with_image_size",
]
