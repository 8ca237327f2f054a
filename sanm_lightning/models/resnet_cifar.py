"""Post-activation ResNets for small images: timm's ResNets with a 3 x 3 stem of stride 1 and no pooling after it."""

from typing import Any, cast

from timm.models import register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from sanm_lightning.models.pooled import own_options

__all__ = ["resnet18_cifar", "resnet34_cifar", "resnet50_cifar"]

CHANNELS = (64, 128, 256, 512)
"""Channels of the stages by default; those of bottleneck blocks are four times as many."""


def _resnet_cifar(
    name: str, block: type[nn.Module], layers: tuple[int, ...], pretrained: bool, options: dict[str, Any]
) -> ResNet:
    options = own_options(name, pretrained, options)
    padding = options.pop("stem_padding", 1)
    network: Any = ResNet(
        **{"block": block, "layers": layers, "channels": CHANNELS, "zero_init_last": False, **options}
    )
    in_chans = options.get("in_chans", 3)
    network.conv1 = nn.Conv2d(in_chans, network.bn1.num_features, 3, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    network.feature_info[0].update(reduction=1)
    for stage in network.feature_info[1:]:
        stage.update(reduction=stage["reduction"] // 4)
    for layer in network.modules():  # the released codes use the initialization of PyTorch
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return cast(ResNet, network)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build the ResNet-18 for CIFAR of C2D and of the released SANM. There are no pre-trained weights.

    Options are those of timm's ``ResNet``, such as ``channels``, and ``stem_padding``, the padding of the stem: 1, and
    0 in the released code of CDR.
    """
    return _resnet_cifar("resnet18_cifar", BasicBlock, (2, 2, 2, 2), pretrained, kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build the ResNet-34 for CIFAR of ELR and of GCE, see :func:`resnet18_cifar`."""
    return _resnet_cifar("resnet34_cifar", BasicBlock, (3, 4, 6, 3), pretrained, kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Build the ResNet-50 for CIFAR of CDR, see :func:`resnet18_cifar`."""
    return _resnet_cifar("resnet50_cifar", Bottleneck, (3, 4, 6, 3), pretrained, kwargs)
