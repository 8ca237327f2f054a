"""Activation maps from feature maps (SANM, Eq. 1)."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Backbone",
    "class_activation_map",
    "classifier_weight",
    "energy_map",
    "feature_map",
    "require_pooled_linear",
    "upsample",
]


class Backbone(Protocol):
    """Interface of a timm model that SANM uses: three methods and one attribute."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w) of images (B, 3, H, W)."""
        ...

    def forward_head(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of a feature map (B, D, h, w)."""
        ...

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the logits."""
        ...


def class_activation_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Return class activation maps: feature maps weighted by the classifier's weights of one class.

    Source: SANM (Tu et al., CVPR 2023), Eq. 1; class activation mapping is Zhou et al., CVPR 2016.

    Args:
        features: last feature map before global pooling, shape (B, D, h, w).
        weight: weight of the linear classifier, shape (C, D).
        classes: class of the map of each image, shape (B,), int64, in [0, C).

    Returns:
        Activation maps, shape (B, h, w), in float32 or, for float64 input, float64. Any sign, any scale.

    Raises:
        ValueError: if the shapes do not match, ``classes`` are not integers, or (on CPU) a class is outside [0, C).
    """
    if (
        features.ndim != 4
        or weight.ndim != 2
        or weight.shape[1] != features.shape[1]
        or classes.shape != (len(features),)
    ):
        raise ValueError(
            "expected features (B, D, h, w), weight (C, D) and classes (B,), got "
            f"{tuple(features.shape)}, {tuple(weight.shape)} and {tuple(classes.shape)}"
        )
    if classes.dtype not in (torch.int64, torch.int32):  # bools and bytes would index as a mask
        raise ValueError(f"expected classes in int64, got {classes.dtype}; convert them")
    if (
        classes.device.type == "cpu"
        and len(classes)
        and not 0 <= int(classes.min()) <= int(classes.max()) < len(weight)
    ):
        raise ValueError(f"expected classes in [0, {len(weight)}), got {int(classes.min())} to {int(classes.max())}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):  # bf16 maps have many tied maxima
        return torch.einsum("bd,bdhw->bhw", weight.to(dtype)[classes], features.to(dtype))


def energy_map(features: Tensor) -> Tensor:
    """Return the squared features summed over the channels, an activation map without a class.

    Source: the authors' released code, which uses it instead of Eq. 1.

    Args:
        features: shape (B, D, h, w).

    Returns:
        Activation maps, shape (B, h, w), non-negative, in float32 or, for float64 input, float64.

    Raises:
        ValueError: if ``features`` is not (B, D, h, w).
    """
    if features.ndim != 4:
        raise ValueError(f"expected features (B, D, h, w), got {tuple(features.shape)}")
    return features.to(torch.promote_types(features.dtype, torch.float32)).square().sum(1)


def upsample(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize activation maps (B, h, w) to ``size`` (H, W), bilinear with half-pixel centers.

    Raises:
        ValueError: if ``activation`` is not (B, h, w).
    """
    if activation.ndim != 3:
        raise ValueError(f"expected activation maps (B, h, w), got {tuple(activation.shape)}")
    # width first, with fewer rows; three times as fast as interpolate on one channel
    for dim in (2, 1):
        low, high, weight = _between(activation.shape[dim], size[dim - 1], activation)
        parts = activation.index_select(dim, low), activation.index_select(dim, high)
        activation = torch.lerp(*parts, weight if dim == 2 else weight.unsqueeze(1))
    return activation


def _between(cells: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two neighboring cells of each of ``size`` pixels, and the weight of the second, (size,) each."""
    place = torch.arange(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    place = ((place + 0.5) * (cells / size) - 0.5).clamp_(0, cells - 1)
    low = place.long()
    return low, (low + 1).clamp_(max=cells - 1), (place - low).to(like.dtype)


def feature_map(features: Tensor, channels: int) -> Tensor:
    """Return ``features`` as (B, D, h, w) with D = ``channels``; channels-last maps (Swin) are permuted.

    Raises:
        ValueError: if the features are tokens (B, N, D) or have another unsupported shape.
    """
    if features.ndim == 4 and features.shape[1] == channels:
        return features
    if features.ndim == 4 and features.shape[3] == channels:
        return features.permute(0, 3, 1, 2)
    raise ValueError(
        f"expected a feature map (B, {channels}, h, w) from forward_features, got {tuple(features.shape)}; "
        "use a convolutional network, not a token-based one"
    )


def classifier_weight(network: Backbone, channels: int) -> Tensor:
    """Return the (C, D) weight of the linear classifier after global pooling, for class activation maps.

    Args:
        network: a network with timm's interface.
        channels: D, number of channels of its last feature map.

    Returns:
        The weight, shape (C, D).

    Raises:
        ValueError: if global pooling is not directly followed by a linear classifier.
    """
    weight = getattr(network.get_classifier(), "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == weight.shape[0] * channels:  # nn.Linear, or a 1 x 1 convolution
        return weight.flatten(1)
    raise ValueError(
        f"expected one linear classifier on the {channels} pooled features of {type(network).__name__} for a class "
        f"activation map, got {network.get_classifier()}; choose place: energy, which requires no classifier"
    )


@torch.no_grad()
def require_pooled_linear(network: Backbone, maps: Tensor, logits: Tensor) -> None:
    """Check that the logits are one linear map of the averaged feature map, as class activation maps require.

    Raises:
        ValueError: if they are not.
    """
    weight = classifier_weight(network, maps.shape[1])
    bias = getattr(network.get_classifier(), "bias", None)
    pooled = F.linear(maps.float().mean((2, 3)), weight.float(), None if bias is None else bias.float())
    if float((pooled - logits.float()).abs().max()) > 0.02 * float(logits.abs().max()) + 1e-3:
        raise ValueError(
            "expected logits that are one linear map of the averaged features for a class activation map, got other "
            f"layers between the last feature map and the logits of {type(network).__name__}; choose place: energy"
        )
