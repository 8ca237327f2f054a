"""Image operations on batches of uint8 images with one strength per image, on any device.

Color operations equal the function of the same name in ``torchvision.transforms.v2.functional``, applied to each image,
with the same rounding; they differ from Pillow's by at most one gray level. Geometric operations equal Pillow's.
Images have C = 3 channels (RGB) or C = 1 (gray); geometric operations and crops support any number.
Strengths are float32 tensors (B,). No function synchronizes with the device.

There are four kinds. Pointwise operations (:data:`TABLES`) return a table of 256 values for each image and channel;
one look-up applies all pointwise operations of a batch. Geometric operations with nearest-neighbor interpolation
(:data:`MOVES`) return a matrix for each image; one resampling applies all of them. :data:`SHEARS` are bicubic. The
others (:data:`NEIGHBORS`) depend on neighboring pixels or other channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sanm_lightning.data.geometry import (
    MOVES,
    SHEARS,
    Move,
    affine,
    affine_matrix,
    resample,
    resized_crop,
    shear,
)

__all__ = [
    "MOVES",
    "NEIGHBORS",
    "NEIGHBOURS",
    "OPERATIONS",
    "SHEARS",
    "TABLES",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "adjust_sharpness",
    "affine",
    "affine_matrix",
    "autocontrast",
    "cutout",
    "equalize",
    "look_up",
    "posterize",
    "resample",
    "resized_crop",
    "shear",
    "solarize",
]


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """Convert bytes (B, 3, H, W) to luma (B, 1, H, W), float32, whole numbers; one channel is its own luma."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, dim=1)
    luma: Tensor = 0.2989 * red + 0.587 * green + 0.114 * blue
    return luma.floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return other + factor (images - other), clamped to [0, 255], as bytes."""
    weight = _each(factor)
    return (images * weight).add_(other * (1 - weight)).clamp_(0, 255).to(torch.uint8)


# Pointwise operations: tables of bytes (B, C, 256), from images and amounts ------------------------------------------


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each byte by its table entry: bytes (B, C, H, W), tables (B, C, 256) -> bytes (B, C, H, W)."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float32)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (_values(images) * factor.view(-1, 1, 1)).clamp_(0, 255).to(torch.uint8).expand(-1, images.shape[1], -1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    weight, mean = factor.view(-1, 1, 1), _gray(images).mean((1, 2, 3)).view(-1, 1, 1)
    return (
        (_values(images) * weight + mean * (1 - weight)).clamp_(0, 255).to(torch.uint8).expand(-1, images.shape[1], -1)
    )


def _autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    flat = images.flatten(2)
    low, high = (part.float().unsqueeze(2) for part in (flat.amin(2), flat.amax(2)))
    values = _values(images).expand(*images.shape[:2], -1)
    stretched = ((values - low) / ((high - low) * (1 / 255))).clamp_(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Equalize the histogram as Pillow does: value v becomes (half a step + pixels below v) / step, rounded down."""
    flat = images.flatten(2).long()
    count = torch.zeros(*images.shape[:2], 256, device=images.device, dtype=torch.int32)
    count.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.int32))
    brightest = count.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = count.cumsum(2, dtype=torch.int32) - count
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, spread, _values(images).int()).to(torch.uint8)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = (8 - bits.round().to(torch.int32)).view(-1, 1, 1)
    return ((_values(images).int() >> dropped) << dropped).to(torch.uint8).expand(-1, images.shape[1], -1)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    values = _values(images)
    return (
        torch.where(values >= threshold.view(-1, 1, 1), 255 - values, values)
        .to(torch.uint8)
        .expand(-1, images.shape[1], -1)
    )


def _invert(images: Tensor, amount: Tensor) -> Tensor:
    return (255 - _values(images)).to(torch.uint8).expand(*images.shape[:2], -1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply bytes (B, C, H, W) by ``factor`` (B,), >= 0."""
    return look_up(images, _brightness(images, factor))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, C, H, W) with their mean luma: ``factor`` (B,), 0 gives a uniform image, 1 the original."""
    return look_up(images, _contrast(images, factor))


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of bytes (B, C, H, W) to 0 and 255."""
    return look_up(images, _autocontrast(images, images.new_empty(0)))


def equalize(images: Tensor) -> Tensor:
    """Give each channel of bytes (B, C, H, W) a flat histogram."""
    return look_up(images, _equalize(images, images.new_empty(0)))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (B,), 0 to 8, of each byte."""
    return look_up(images, _posterize(images, bits))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the bytes that are ``threshold`` (B,) or more."""
    return look_up(images, _solarize(images, threshold))


# Operations on neighboring pixels or other channels ------------------------------------------------------------------


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, C, H, W) with their luma: ``factor`` (B,), 0 gives a gray image, 1 the original."""
    if images.shape[1] == 1:
        return images
    return _blend(images, _gray(images), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, C, H, W) with a smoothed copy: ``factor`` (B,), 0 gives the smoothed image, 1 the original.

    Pixels at the border are unchanged.
    """
    if min(images.shape[2:]) <= 2:
        return images
    whole = images.to(torch.int16)
    rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = whole[..., 1:-1, 1:-1]
    smooth = (
        (box + 4 * middle) / 13
    ).round_()  # weights: center 5 / 13, neighbors 1 / 13; division by 13 never gives a tie
    out = images.clone()
    out[..., 1:-1, 1:-1] = (middle + (smooth - middle) * (1 - _each(factor))).clamp_(0, 255).to(torch.uint8)
    return out


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of bytes (B, C, H, W) by ``shift`` (B,) turns, in [-0.5, 0.5]; gray images have no hue."""
    if images.shape[1] == 1:
        return images
    rgb = images.float() / 255
    value, low = rgb.amax(1), rgb.amin(1)
    spread = value - low
    red, green, blue = rgb.unbind(1)
    safe = torch.where(spread > 0, spread, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sixths + 6 * shift.view(-1, 1, 1)
    # Fraction of the spread by which each channel is below the value, from the hue's distance to the channel's
    # opposite.
    away = torch.stack([turned + 3, turned + 1, turned - 1], dim=1)
    fraction = (2 - (away - 6 * (away / 6).round_()).abs_()).clamp_(0, 1)
    out = value.unsqueeze(1) - spread.unsqueeze(1) * fraction
    return out.mul_(256 - 1e-3).clamp_(0, 255).to(torch.uint8)


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int, grey: int = 127) -> Tensor:
    """Fill a square of each image with a constant gray value, clipped at the border.

    Args:
        images: bytes, shape (B, C, H, W).
        row: row of the pixel directly below the center of the square, shape (B,).
        column: column of the pixel directly right of the center, shape (B,).
        side: side of the square in pixels; if it is odd, ``row`` and ``column`` are those of its middle pixel.
        grey: gray value, 0 to 255.

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    rows = torch.arange(images.shape[2], device=images.device) - row.view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device) - column.view(-1, 1)
    first, last = -(side // 2), (side - 1) // 2
    inside_rows, inside_columns = ((part >= first) & (part <= last) for part in (rows, columns))
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None]
    return images * ~inside + grey * inside.to(torch.uint8)  # four times as fast as masked_fill on the CPU


Operation = Callable[[Tensor, Tensor], Tensor]

TABLES: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
}
"""Name -> function (images, amount) to tables (B, C, 256) for :func:`look_up`."""

NEIGHBORS: dict[str, Operation] = {
    "grey": lambda images, amount: _gray(images).to(torch.uint8).expand_as(images),
    "saturation": adjust_saturation,
    "sharpness": adjust_sharpness,
    "hue": adjust_hue,
}
"""Name -> function (images, amount) to images."""

NEIGHBOURS = NEIGHBORS
"""Alias of :data:`NEIGHBORS` for earlier imports."""


def _by_table(table: Operation) -> Operation:
    return lambda images, amount: look_up(images, table(images, amount))


def _by_shear(name: str) -> Operation:
    return lambda images, amount: SHEARS[name](images, amount, 0)


def _by_move(move: Move) -> Operation:
    return lambda images, amount: resample(images, move(amount, (images.shape[2], images.shape[3])))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, amount: images,
    **{name: _by_table(table) for name, table in TABLES.items()},
    **{name: _by_move(move) for name, move in MOVES.items()},
    **{name: _by_shear(name) for name in SHEARS},
    **NEIGHBORS,
}
"""Name -> function (images, amount) of bytes (B, C, H, W) and one amount per image (B,): a factor, bits, a threshold,
degrees, a slope or pixels. Geometric operations are 0 outside of the image. Names as in AutoAugment (Cubuk et al., CVPR
2019); shears keep the upper left corner fixed, as there. The order is: identity, :data:`TABLES`, :data:`MOVES`,
:data:`SHEARS`, :data:`NEIGHBORS`."""
