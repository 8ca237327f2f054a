"""Input normalization as the first layer of a network, for images in [0, 1]."""

import contextlib
import difflib
import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sanm_lightning.models.downloads import no_weights, offline_if_unreachable
from sanm_lightning.models.pooled import pooled_width
from sanm_lightning.models.tokens import last_block_and_head, reads_class_token, without_last_block
from sanm_lightning.models.weight_files import create_from_file, weight_file

__all__ = ["Normalized", "create_network", "with_image_size"]

NEUTRAL = (0.5, 0.25)
"""Default mean and standard deviation of each channel for images with unknown statistics."""

INVALID_OPTIONS = (
    TypeError, RuntimeError, MemoryError, OverflowError, ZeroDivisionError, AttributeError, AssertionError
)  # fmt: skip
"""Exceptions of constructors of networks for invalid options."""
SIZE_OPTIONS = {"img_size", "dynamic_img_size", "strict_img_size"}
"""Options of timm models for images of other sizes."""


class Normalized(nn.Module):
    """Wrapper of a network with timm's interface that normalizes images in [0, 1].

    The fill U(0, 1) and the reconstruction target of SANM are then in the range of the paper, and the state dict
    contains the statistics.

    Args:
        network: a network with timm's interface.
        mean: mean of each channel over the training images, in [0, 1].
        std: standard deviation of each channel, positive.

    Raises:
        ValueError: if the numbers of means and standard deviations differ, a value is not finite, or a standard
            deviation is not positive; in a forward pass, if the images have another number of channels.
    """

    mean: Tensor
    std: Tensor
    input_size: tuple[int, int] | None = None
    """(H, W) of the images used for pre-training, in pixels; None if unknown."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if not 0 < len(mean) == len(std) or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
            count = ("one", "two", "three", "four")[max(0, min(4, len(mean)) - 1)]
            raise ValueError(
                f"expected {count} means and {count} positive standard deviations, got mean {mean} and std {std}; use those of "
                "the training images, one per channel"
            )
        inner: Any = network
        self.network = inner
        self.num_features = int(inner.num_features)
        self.head_hidden_size = pooled_width(inner)
        self._reads_class_token = reads_class_token(inner)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    @property
    def map_place(self) -> str:
        """Where the feature map is taken, for messages."""
        return "the tokens before the last block" if self._reads_class_token else "the output of forward_features"

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of images (B, C, H, W) in [0, 1] that lead to the logits, in the network's layout.

        They are (B, D, h, w) or (B, h, w, D), or tokens (B, P + h w, D), P class tokens first. For a vision transformer
        with a class token, they are those before the last block.
        """
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"expected images of {len(self.mean)} channels, the in_chans of the network, got {images.shape[1]}; set "
                "in_chans in network_args, or the channels of the data"
            )
        normalized = (images - self.mean) / self.std
        normalized = normalized.contiguous(memory_format=torch.channels_last)  # faster convolutions
        if self._reads_class_token:
            return without_last_block(self.network, normalized)
        features: Tensor = self.network.forward_features(normalized)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, C) of features, or the pooled features (B, ``head_hidden_size``) with ``pre_logits``."""
        if self._reads_class_token:
            return last_block_and_head(self.network, features, pre_logits)
        out: Tensor = self.network.forward_head(features, pre_logits=pre_logits)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the wrapped network."""
        classifier: nn.Module = self.network.get_classifier()
        return classifier

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, C, H, W) in [0, 1]."""
        return self.forward_head(self.forward_features(images))


def with_image_size(name: str, options: dict[str, Any], image_size: tuple[int, int]) -> dict[str, Any]:
    """Return the options of a timm model with ``img_size``, if the model (ViT, Swin) requires images of a fixed size.

    Args:
        name: timm model name.
        options: arguments of ``timm.create_model``; those about the image size have precedence.
        image_size: H, W of the images in pixels.
    """
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.fixed_input_size or SIZE_OPTIONS & set(options):
        return options
    return {**options, "img_size": image_size}


def _initialize(classifier: nn.Module) -> None:
    """Initialize a new classifier with small weights, N(0, .01^2), as torchvision does for MobileNetV2.

    The initialization of timm is meant for training from scratch: for EfficientNet, its weights for ten classes are so large
    that the first steps destroy the pre-trained features.
    """
    for part in classifier.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.normal_(part.weight, std=0.01)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def create_network(
    name: str,
    num_classes: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **options: Any,
) -> Normalized:
    """Create a timm model, including those of this package, for images in [0, 1].

    Args:
        name: timm model name, such as ``preact_resnet18``, ``cnn9``, ``resnet50``.
        num_classes: C, number of classes.
        mean: channel means; None uses those of the pre-trained model, or .5 without pre-trained weights.
        std: channel standard deviations; None uses those of the pre-trained model, or .25.
        options: arguments of ``timm.create_model``, such as ``width``, ``pretrained``, ``drop_rate``. Pre-trained weights
            are those of ``pretrained_cfg_overlay={"file": ...}``, or of an installed distribution
            (:data:`~sanm_lightning.models.weight_files.PACKAGED_WEIGHTS`), or else those of timm, which are downloaded. A
            classifier for another number of classes than theirs is new and has small weights.

    Returns:
        The network.

    Raises:
        ValueError: if timm has no such model (the message lists similar names), the options are invalid or disable the
            global pooling, the number of means or standard deviations is not that of the channels (``in_chans``), or
            pre-trained weights cannot be loaded.
        FileNotFoundError: if the weight file does not exist.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"expected the name of a timm model, got {name!r}" + (f"; choose one of {', '.join(near)}" if near else "")
        )
    if options.get("global_pool") in ("", False):
        raise ValueError(
            f"expected network_args with a global pooling of timm, which returns logits (B, C), got global_pool "
            f"{options['global_pool']!r}; omit global_pool, or use avg or another pooling of {name!r}"
        )
    pretrained, channels = bool(options.get("pretrained")), int(options.get("in_chans", 3))
    file = weight_file(name, options) if pretrained else None
    try:
        with offline_if_unreachable() if pretrained and file is None else contextlib.nullcontext():
            if file is None:
                network: Any = timm.create_model(name, num_classes=num_classes, **options)
            else:
                network = create_from_file(name, file, num_classes=num_classes, **options)
    except INVALID_OPTIONS as error:
        raise ValueError(
            f"expected valid options of the network {name!r}, got num_classes {num_classes} and network_args "
            f"{options} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from error
    except Exception as error:  # hub, network and file system raise various exceptions
        if not pretrained or type(error) in (ValueError, FileNotFoundError):
            raise
        raise no_weights(name, error) from error
    if pretrained:
        own = network.pretrained_cfg
        if own.get("num_classes") != num_classes:
            _initialize(network.get_classifier())
        mean, std = mean or _for_channels(own["mean"], channels), std or _for_channels(own["std"], channels)
    mean, std = (tuple(given or (value,) * channels) for given, value in zip((mean, std), NEUTRAL, strict=True))
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"expected {channels} means and {channels} standard deviations, one per channel of the network (in_chans), got "
            f"mean {mean} and std {std}; set in_chans in network_args, or mean and std"
        )
    return Normalized(network, mean, std)


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return statistics of RGB images for another number of channels: their average for each, as for gray images."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
