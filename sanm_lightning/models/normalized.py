"""Normalisation as the first layer of a network: images stay in [0, 1] up to there."""

import difflib
import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

__all__ = ["Normalized", "create_network"]

NEUTRAL = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
"""Mean and standard deviation for images of which nothing is known."""


class Normalized(nn.Module):
    """A network by timm's conventions that takes images in [0, 1] and normalises them itself.

    Then the fill U(0, 1) and the reconstruction target of SANM mean what the paper says, and a saved network is usable without
    knowing the statistics: they are in its state dict.

    Args:
        network: a network by timm's conventions.
        mean: mean of each channel over the training images, in [0, 1].
        std: standard deviation of each channel, positive.

    Raises:
        ValueError: if there are not three of each, or a standard deviation is not positive, or one is not finite.
    """

    mean: Tensor
    std: Tensor
    input_size: tuple[int, int] | None = None
    """(H, W) in pixels of the images that pre-trained weights were trained on; None where that is not known."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
            raise ValueError(
                f"expected three means and three positive standard deviations, got mean {mean} and std {std}"
            )
        inner: Any = network
        self.network = inner
        self.num_features = int(inner.num_features)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> feature map (B, D, h, w)."""
        normalised = (images - self.mean) / self.std
        normalised = normalised.contiguous(memory_format=torch.channels_last)  # convolutions like it
        features: Tensor = self.network.forward_features(normalised)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C), or, with ``pre_logits``, the pooled features."""
        out: Tensor = self.network.forward_head(features, pre_logits=pre_logits)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the classifier of the wrapped network."""
        classifier: nn.Module = self.network.get_classifier()
        return classifier

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C)."""
        return self.forward_head(self.forward_features(images))


def create_network(
    name: str,
    num_classes: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **options: Any,
) -> Normalized:
    """Build a timm model, ours included, that takes images in [0, 1].

    Args:
        name: timm model name, as ``preact_resnet18``, ``cnn9``, ``resnet50``.
        num_classes: C.
        mean: channel means; None takes the pre-trained model's own, or .5 where nothing is pre-trained.
        std: channel standard deviations, likewise, or .25.
        options: handed to ``timm.create_model``, as ``width``, ``pretrained``, ``drop_rate``.

    Raises:
        ValueError: if timm knows no such model; the message lists the nearest names. Or if it cannot be made with the options.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(
            f"expected the name of a timm model, got {name!r}" + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        network: Any = timm.create_model(name, num_classes=num_classes, **options)
    except (
        TypeError,
        RuntimeError,
        MemoryError,
        OverflowError,
        ZeroDivisionError,
        AttributeError,
        AssertionError,
    ) as error:
        # What a constructor makes of wrong options is as manifold as the constructors.
        raise ValueError(
            f"expected options that the network {name!r} can be made with, got num_classes {num_classes} and network_args "
            f"{options} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        ) from error
    if options.get("pretrained"):
        own = network.pretrained_cfg
        mean, std = mean or own["mean"], std or own["std"]
    return Normalized(network, tuple(mean or NEUTRAL[0]), tuple(std or NEUTRAL[1]))
