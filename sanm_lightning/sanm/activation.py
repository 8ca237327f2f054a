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
    """The three methods of a timm model that SANM calls, and the one number it reads."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> feature map (B, D, h, w)."""
        ...

    def forward_head(self, features: Tensor) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C)."""
        ...

    def get_classifier(self) -> nn.Module:
        """Return the linear layer that makes the logits."""
        ...


def class_activation_map(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Sum the feature maps of each image, weighted by the classifier's weights for one class.

    Source: SANM (Tu et al., CVPR 2023), Eq. 1; class activation mapping is Zhou et al., CVPR 2016.

    Args:
        features: last feature map before global pooling, shape (B, D, h, w).
        weight: weight of the linear classifier, shape (C, D).
        classes: the class whose map is wanted of each image, shape (B,), int64, in [0, C).

    Returns:
        Activation maps, shape (B, h, w), in float32 or, for float64 input, float64. Any sign, any scale.

    Raises:
        ValueError: if the shapes do not fit together, ``classes`` are no integers, or (on CPU) a class is outside [0, C).
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
    if classes.dtype not in (torch.int64, torch.int32):  # a mask of bools or bytes would pick rows instead
        raise ValueError(f"expected classes in int64, got {classes.dtype}")
    if (
        classes.device.type == "cpu"
        and len(classes)
        and not 0 <= int(classes.min()) <= int(classes.max()) < len(weight)
    ):
        raise ValueError(f"expected classes in [0, {len(weight)}), got {int(classes.min())} to {int(classes.max())}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):  # the maximum of a bf16 map would be full of ties
        return torch.einsum("bd,bdhw->bhw", weight.to(dtype)[classes], features.to(dtype))


def energy_map(features: Tensor) -> Tensor:
    """Sum the squared features over the channels: an activation map that needs no class.

    Source: the authors' released code, which uses this in place of Eq. 1.

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
    """Enlarge activation maps (B, h, w) to ``size`` (H, W), bilinear with half-pixel centres.

    Raises:
        ValueError: if ``activation`` is not (B, h, w).
    """
    if activation.ndim != 3:
        raise ValueError(f"expected activation maps (B, h, w), got {tuple(activation.shape)}")
    # first to the right, while there are few rows; three times as fast as interpolate on one channel
    for dim in (2, 1):
        low, high, share = _between(activation.shape[dim], size[dim - 1], activation)
        parts = activation.index_select(dim, low), activation.index_select(dim, high)
        activation = torch.lerp(*parts, share if dim == 2 else share.unsqueeze(1))
    return activation


def _between(cells: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Say between which two cells each of ``size`` pixels lies, and how far it is to the second, three times (size,)."""
    place = torch.arange(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    place = ((place + 0.5) * (cells / size) - 0.5).clamp_(0, cells - 1)
    low = place.long()
    return low, (low + 1).clamp_(max=cells - 1), (place - low).to(like.dtype)


def feature_map(features: Tensor, channels: int) -> Tensor:
    """Return ``features`` as (B, D, h, w) with D = ``channels``; channels-last maps (Swin) are permuted.

    Raises:
        ValueError: if the network yields tokens (B, N, D) or another shape that holds no map.
    """
    if features.ndim == 4 and features.shape[1] == channels:
        return features
    if features.ndim == 4 and features.shape[3] == channels:
        return features.permute(0, 3, 1, 2)
    raise ValueError(
        f"expected a feature map (B, {channels}, h, w) from forward_features, got {tuple(features.shape)}; "
        "SANM needs a convolutional network, not one of tokens"
    )


def classifier_weight(network: Backbone, channels: int) -> Tensor:
    """Return the (C, D) weight that makes a class activation map of ``network``'s last feature map exact.

    Args:
        network: a network by timm's conventions.
        channels: D, the number of channels of its last feature map.

    Raises:
        ValueError: if no linear classifier follows directly on the global pooling.
    """
    weight = getattr(network.get_classifier(), "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == weight.shape[0] * channels:  # nn.Linear, or a 1 x 1 convolution
        return weight.flatten(1)
    raise ValueError(
        f"a class activation map needs one linear classifier on the {channels} pooled features, and "
        f"{type(network).__name__} ends with {network.get_classifier()}; choose place: energy, which needs no classifier"
    )


@torch.no_grad()
def require_pooled_linear(network: Backbone, maps: Tensor, logits: Tensor) -> None:
    """Refuse a network whose logits are not one linear map of the mean of its feature map: its CAM would be another's."""
    weight = classifier_weight(network, maps.shape[1])
    bias = getattr(network.get_classifier(), "bias", None)
    pooled = F.linear(maps.float().mean((2, 3)), weight.float(), None if bias is None else bias.float())
    if float((pooled - logits.float()).abs().max()) > 0.02 * float(logits.abs().max()) + 1e-3:
        raise ValueError(
            f"a class activation map needs logits that are one linear map of the averaged features, and "
            f"{type(network).__name__} does more between its last feature map and its logits; choose place: energy"
        )
