"""The papers' own networks, registered with timm, and normalisation as a network's first layer."""

from sanm_lightning.models.cnn9 import CNN9
from sanm_lightning.models.normalized import Normalized, create_network
from sanm_lightning.models.preact_resnet import PreActResNet

__all__ = ["CNN9", "Normalized", "PreActResNet", "create_network"]
