"""Pre-activation ResNet-18 for small images, the network of the published CIFAR results."""

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from sanm_lightning.models.pooled import PooledClassifier, own_options

__all__ = ["PreActResNet", "preact_resnet18", "preact_resnet18_dividemix"]


class PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions, with a shortcut (He et al., ECCV 2016).

    An identity shortcut passes the input, or with ``activated_shortcut`` the input after batch norm and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activated_shortcut: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False) if changes else None
        self.stride = stride
        self.activated_shortcut = activated_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        active = torch.relu(self.norm1(x))
        # Subsampled before the 1 x 1 convolution: the equivalent strided convolution with fewer than 8 channels in
        # channels_last crashes in its backward pass on CPUs without AVX-512 (torch 2.14).
        if self.shortcut is not None:
            passed = self.shortcut(active[:, :, :: self.stride, :: self.stride])
        else:
            passed = active if self.activated_shortcut else x
        out: Tensor = self.conv2(torch.relu(self.norm2(self.conv1(active)))) + passed
        return out


class PreActResNet(PooledClassifier):
    """Four stages of two pre-activation blocks on a 3 x 3 stem without pooling.

    Source: He et al., ECCV 2016, in the form that DivideMix and ELR+ use on CIFAR: batch norm and ReLU after the stem,
        none after the last stage, so the last feature map can be negative.

    Args:
        num_classes: C, number of classes.
        in_chans: number of input channels.
        width: number of channels of the first stage, doubled by each stage; published: 64.
        blocks: number of pre-activation blocks in each stage.
        stem_stride: stride of the first convolution; 2 reduces the cost to a quarter, for larger images.
        activated_shortcut: identity shortcuts pass the input after batch norm and ReLU, as in the released code of
            DivideMix, ELR+ and SSR, instead of the input. Both forms have the same parameters.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 64,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        stem_stride: int = 1,
        activated_shortcut: bool = False,
    ) -> None:
        widths = [width << stage for stage in range(len(blocks))]
        super().__init__(widths[-1], num_classes)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, stride=stem_stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        layers: list[nn.Module] = []
        inputs = width
        for stage, (outputs, depth) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                layers.append(PreActBlock(inputs, outputs, stride, activated_shortcut))
                inputs = outputs
        self.stages = nn.Sequential(*layers)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w) of images (B, 3, H, W): (B, 8 width, H / 8, W / 8) with four stages."""
        out: Tensor = self.stages(self.stem(x))
        return out


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build the CIFAR PreAct ResNet-18; ``width`` scales it. There are no pre-trained weights."""
    return PreActResNet(**own_options("preact_resnet18", pretrained, kwargs))


@register_model
def preact_resnet18_dividemix(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Build the CIFAR PreAct ResNet-18 of the released code of DivideMix, ELR+ and SSR.

    Its identity shortcuts pass the activated input. There are no pre-trained weights.
    """
    options = own_options("preact_resnet18_dividemix", pretrained, kwargs)
    return PreActResNet(**{"activated_shortcut": True, **options})
