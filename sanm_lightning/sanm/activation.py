"""Activation maps from feature maps (SANM, Eq. 1)."""

from collections.abc import Sequence
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
    "gradient_activation_map",
    "is_pooled_linear",
    "quantize",
    "upsample",
]

MAX_PREFIX_TOKENS = 16
"""Largest number of class and register tokens before the patches."""


class Backbone(Protocol):
    """Interface of a timm model that SANM uses: three methods and one attribute.

    Feature maps may also be channels-last, shape (B, h, w, D), or tokens, shape (B, P + h w, D), of which the first P
    are class or register tokens.
    """

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


def gradient_activation_map(features: Tensor, gradient: Tensor) -> Tensor:
    """Return gradient-weighted class activation maps: feature maps weighted by the gradient of a logit.

    Source: Grad-CAM (Selvaraju et al., ICCV 2017), Eq. 1 and 2.
    Departure: the gradient is summed over positions instead of averaged, so that the map of a linear classifier on the
    averaged feature map is the class activation map of SANM's Eq. 1, and negative values are kept, as in that equation.

    Args:
        features: last feature map, shape (B, D, h, w).
        gradient: gradient of each image's logit with respect to ``features``, same shape.

    Returns:
        Activation maps, shape (B, h, w), in float32 or, for float64 input, float64. Any sign, any scale.

    Raises:
        ValueError: if the shapes are not (B, D, h, w), or differ.
    """
    if features.ndim != 4 or features.shape != gradient.shape:
        raise ValueError(
            f"expected features and gradient (B, D, h, w), got {tuple(features.shape)} and {tuple(gradient.shape)}"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    weight = gradient.to(dtype).sum((2, 3))  # (B, D)
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum("bd,bdhw->bhw", weight, features.to(dtype))


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


def quantize(activation: Tensor, levels: int) -> Tensor:
    """Scale each activation map (B, h, w) to 0 to ``levels`` - 1, and round down. A constant map becomes 0.

    Source: the released code of SANM, with 256 levels, the values of a gray image.
    """
    low, high = activation.amin((1, 2), keepdim=True), activation.amax((1, 2), keepdim=True)
    return ((activation - low) / torch.where(high > low, high - low, 1) * (levels - 1)).floor()


def _between(cells: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two neighboring cells of each of ``size`` pixels, and the weight of the second, (size,) each."""
    place = torch.arange(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    place = ((place + 0.5) * (cells / size) - 0.5).clamp_(0, cells - 1)
    low = place.long()
    return low, (low + 1).clamp_(max=cells - 1), (place - low).to(like.dtype)


def feature_map(features: Tensor, channels: int, image_size: Sequence[int] | None = None) -> Tensor:
    """Return ``features`` as (B, D, h, w) with D = ``channels``.

    Channels-last maps (Swin) are permuted. Tokens (ViT) are reshaped to the grid of square patches that cover the image
    row by row; class and register tokens, which precede the patches, are omitted.

    Args:
        features: shape (B, D, h, w), (B, h, w, D) or (B, P + h w, D).
        channels: D, number of channels.
        image_size: H, W of the images in pixels, required for tokens.

    Raises:
        ValueError: if the features have another shape, or the number of tokens fits no grid of square patches.
    """
    if features.ndim == 4 and features.shape[1] == channels:
        return features
    if features.ndim == 4 and features.shape[3] == channels:
        return features.permute(0, 3, 1, 2)
    grid = None
    if features.ndim == 3 and features.shape[2] == channels and image_size is not None:
        grid = _patch_grid(features.shape[1], image_size[0], image_size[1])
    if grid is None:
        raise ValueError(
            f"expected a feature map (B, {channels}, h, w), (B, h, w, {channels}) or tokens of square patches, got "
            f"{tuple(features.shape)}; set the submodule whose output is the last feature map with layer= (sanm_layer= "
            "of the mixin)"
        )
    patches = features[:, features.shape[1] - grid[0] * grid[1] :]
    return patches.transpose(1, 2).reshape(len(features), channels, *grid)


def _patch_grid(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Return h, w of the largest grid of square patches with at most ``tokens`` of them; None without a fitting one."""
    for side in range(1, min(height, width) + 1):
        if height % side == 0 and width % side == 0:
            grid = height // side, width // side
            extra = tokens - grid[0] * grid[1]
            if extra >= 0:
                return grid if extra <= MAX_PREFIX_TOKENS else None
    return None


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
        f"activation map, got {network.get_classifier()}; use a network with one linear layer after global pooling"
    )


@torch.no_grad()
def is_pooled_linear(network: Backbone, maps: Tensor, logits: Tensor) -> bool:
    """Return whether logits (B, C) are one linear map of the averaged feature maps (B, D, h, w).

    This is the condition under which Eq. 1 is exact. The logits are computed again from the maps and compared, within
    the rounding error of the type of the logits.
    """
    try:
        weight = classifier_weight(network, maps.shape[1]).float()
    except ValueError:
        return False
    bias = getattr(network.get_classifier(), "bias", None)
    without_bias = logits.float() if bias is None else logits.float() - bias.float()
    pooled = maps.float().mean((2, 3))
    expected = F.linear(pooled, weight)
    if expected.shape != without_bias.shape:
        return False
    terms = F.linear(pooled.square(), weight.square()).sqrt()  # size of the sum, for its rounding error
    rounding = torch.finfo(logits.dtype).eps * float(torch.maximum(terms, logits.abs()).max())
    return float((expected - without_bias).abs().max()) <= 1e-3 * float(without_bias.abs().max()) + 4 * rounding
