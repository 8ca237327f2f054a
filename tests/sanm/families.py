"""Small networks of the usual families, with random weights, and where the map of each is expected."""

from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock

CLASSES = 3


class Family(NamedTuple):
    make: Callable[[], nn.Module]
    size: int
    layer: str
    """Submodule whose output is the last map that leads to the logits."""
    layout: str
    """maps (B, D, h, w), last (B, h, w, D), or tokens (B, P + h w, D)."""
    kind: str
    """cam where the logits are one linear map of the averaged map, else grad_cam."""

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make()
            for parameter in network.parameters():
                if not parameter.any():  # torchvision's vision transformer starts with a head of zeros
                    nn.init.normal_(parameter, std=0.02)
        return network


def of_timm(name: str, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        network: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
        return network

    make.arguments = (name, options)  # type: ignore[attr-defined]
    return make


def vision_transformer() -> nn.Module:
    return tv.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES)


def swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=CLASSES)


def efficientnet() -> nn.Module:
    blocks = [MBConvConfig(4, 3, 2, 8, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 1)]
    return tv.EfficientNet(blocks, dropout=0.2, num_classes=CLASSES, last_channel=64)


def regnet() -> nn.Module:
    return tv.RegNet(BlockParams([1, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), num_classes=CLASSES)


SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
BLOCKS = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]

TIMM = {
    "ResNet": Family(of_timm("test_resnet"), 64, "layer4", "maps", "cam"),
    "DenseNet": Family(of_timm("densenet121", growth_rate=8, block_config=(2, 2)), 32, "features", "maps", "cam"),
    "EfficientNet": Family(of_timm("test_efficientnet"), 64, "bn2", "maps", "cam"),
    "RegNet": Family(of_timm("regnetx_002"), 64, "s4", "maps", "cam"),
    "ConvNeXt": Family(of_timm("test_convnext"), 64, "stages", "maps", "grad_cam"),
    "MobileNetV3": Family(of_timm("mobilenetv3_small_050"), 64, "blocks", "maps", "grad_cam"),
    "Swin": Family(of_timm("swin_tiny_patch4_window7_224", **SWIN), 32, "norm", "last", "cam"),
    "ViT, class token": Family(of_timm("test_vit", img_size=64), 64, "blocks.4", "tokens", "grad_cam"),
    "ViT, average": Family(of_timm("test_vit", img_size=64, global_pool="avg"), 64, "norm", "tokens", "grad_cam"),
    "ViT, registers": Family(of_timm("test_vit2", img_size=64), 64, "norm", "tokens", "grad_cam"),
}
"""Networks of timm."""

TORCHVISION = {
    "ResNet": Family(lambda: tv.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES), 64, "layer4", "maps", "cam"),
    "DenseNet": Family(lambda: tv.DenseNet(8, (2, 2), 16, num_classes=CLASSES), 32, "features", "maps", "grad_cam"),
    "EfficientNet": Family(efficientnet, 64, "features", "maps", "cam"),
    "RegNet": Family(regnet, 64, "trunk_output", "maps", "cam"),
    "ConvNeXt": Family(lambda: tv.ConvNeXt(BLOCKS, num_classes=CLASSES), 64, "features", "maps", "grad_cam"),
    "MobileNetV3": Family(lambda: tv.mobilenet_v3_small(num_classes=CLASSES), 64, "features", "maps", "grad_cam"),
    "Swin": Family(swin, 32, "permute", "maps", "cam"),
    "ViT, class token": Family(vision_transformer, 32, "encoder.layers.encoder_layer_1", "tokens", "grad_cam"),
}
"""Networks of torchvision."""

ALL = {f"timm {name}": family for name, family in TIMM.items()}
ALL |= {f"torchvision {name}": family for name, family in TORCHVISION.items()}
