"""Pre-activation ResNet-18 for small images, the network of the CIFAR tables."""

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

__all__ = ["PreActResNet", "preact_resnet18"]


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions, and a shortcut around them (He et al., ECCV 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        active = torch.relu(self.norm1(x))
        passed = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active)))) + passed
        return out


class PreActResNet(nn.Module):
    """Four stages of two pre-activation blocks on a 3 x 3 stem without pooling.

    Source: He et al., ECCV 2016, in the form that DivideMix and ELR+ use on CIFAR: batch norm and ReLU after the stem, none
    after the last stage, so the last feature map has either sign.

    Args:
        num_classes: C, number of classes.
        in_chans: input channels.
        width: channels of the first stage; 64 is the published network, each stage doubles them.
        blocks: pre-activation blocks in each stage.
        stem_stride: stride of the first convolution; 2 quarters the cost on images that bear it.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 64,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        widths = [width << stage for stage in range(len(blocks))]
        self.num_classes, self.num_features = num_classes, widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, stride=stem_stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        layers: list[nn.Module] = []
        inputs = width
        for stage, (outputs, depth) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(depth):
                layers.append(PreActBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> last feature map (B, D, h, w): (B, 8 width, H / 8, W / 8) with four stages."""
        out: Tensor = self.stages(self.stem(x))
        return out

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C), or, with ``pre_logits``, the pooled features (B, D)."""
        pooled = features.mean(dim=(2, 3))
        out: Tensor = pooled if pre_logits else self.fc(pooled)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for ``num_classes``."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(x))


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build the CIFAR PreAct ResNet-18; ``width`` scales it. There are no pre-trained weights."""
    if pretrained:
        raise ValueError("preact_resnet18 has no pre-trained weights; leave pretrained out")
    return PreActResNet(**_own(kwargs))


def _own(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop what timm's factory passes to every model."""
    return {
        key: value
        for key, value in kwargs.items()
        if key not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    }
