"""Image operations on batches of uint8 images with one strength per image, on any device.

Each operation equals the function of the same name in ``torchvision.transforms.v2.functional``, applied to each image,
with the same rounding, and nearest-neighbor interpolation for geometric operations. Strengths are float32 tensors (B,).
No function synchronizes with the device.

There are three kinds. Pointwise operations (:data:`TABLES`) return a table of 256 values for each image and channel;
one look-up applies all pointwise operations of a batch. Geometric operations (:data:`MOVES`) return a matrix for each
image; one resampling applies all of them. The others (:data:`NEIGHBORS`) depend on neighboring pixels or other
channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.data.views import CropFlip

__all__ = [
    "MOVES",
    "NEIGHBORS",
    "NEIGHBOURS",
    "OPERATIONS",
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
    "solarize",
]


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _gray(images: Tensor) -> Tensor:
    """Convert bytes (B, 3, H, W) to luma (B, 1, H, W), float32, whole numbers."""
    red, green, blue = images.float().split(1, dim=1)
    luma: Tensor = 0.2989 * red + 0.587 * green + 0.114 * blue
    return luma.floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return other + factor (images - other), clamped to [0, 255], as bytes."""
    weight = _each(factor)
    return (images * weight).add_(other * (1 - weight)).clamp_(0, 255).to(torch.uint8)


# Pointwise operations: tables of bytes (B, 3, 256), from images and amounts ------------------------------------------


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each byte by its table entry: bytes (B, 3, H, W), tables (B, 3, 256) -> bytes (B, 3, H, W)."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device, dtype=torch.float32)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (_values(images) * factor.view(-1, 1, 1)).clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    weight, mean = factor.view(-1, 1, 1), _gray(images).mean((1, 2, 3)).view(-1, 1, 1)
    return (_values(images) * weight + mean * (1 - weight)).clamp_(0, 255).to(torch.uint8).expand(-1, 3, -1)


def _autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    flat = images.flatten(2)
    low, high = (part.float().unsqueeze(2) for part in (flat.amin(2), flat.amax(2)))
    values = _values(images).expand(len(images), 3, -1)
    stretched = ((values - low) / ((high - low) * (1 / 255))).clamp_(0, 255)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Equalize the histogram as Pillow does: value v becomes (half a step + pixels below v) / step, rounded down."""
    flat = images.flatten(2).long()
    count = torch.zeros(len(images), 3, 256, device=images.device, dtype=torch.int32)
    count.scatter_add_(2, flat, torch.ones_like(flat, dtype=torch.int32))
    brightest = count.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = count.cumsum(2, dtype=torch.int32) - count
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, spread, _values(images).int()).to(torch.uint8)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = (8 - bits.round().to(torch.int32)).view(-1, 1, 1)
    return ((_values(images).int() >> dropped) << dropped).to(torch.uint8).expand(-1, 3, -1)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    values = _values(images)
    return torch.where(values >= threshold.view(-1, 1, 1), 255 - values, values).to(torch.uint8).expand(-1, 3, -1)


def _invert(images: Tensor, amount: Tensor) -> Tensor:
    return (255 - _values(images)).to(torch.uint8).expand(len(images), 3, -1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply bytes (B, 3, H, W) by ``factor`` (B,), >= 0."""
    return look_up(images, _brightness(images, factor))


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with their mean luma: ``factor`` (B,), 0 gives a uniform image, 1 the original."""
    return look_up(images, _contrast(images, factor))


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of bytes (B, 3, H, W) to 0 and 255."""
    return look_up(images, _autocontrast(images, images.new_empty(0)))


def equalize(images: Tensor) -> Tensor:
    """Give each channel of bytes (B, 3, H, W) a flat histogram."""
    return look_up(images, _equalize(images, images.new_empty(0)))


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (B,), 0 to 8, of each byte."""
    return look_up(images, _posterize(images, bits))


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the bytes that are ``threshold`` (B,) or more."""
    return look_up(images, _solarize(images, threshold))


# Operations on neighboring pixels or other channels ------------------------------------------------------------------


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with their luma: ``factor`` (B,), 0 gives a gray image, 1 the original."""
    return _blend(images, _gray(images), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with a smoothed copy: ``factor`` (B,), 0 gives the smoothed image, 1 the original.

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
    """Shift the hue of bytes (B, 3, H, W) by ``shift`` (B,) turns, in [-0.5, 0.5]."""
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
        images: bytes, shape (B, 3, H, W).
        row: row of the pixel directly below the center of the square, shape (B,).
        column: column of the pixel directly right of the center, shape (B,).
        side: side of the square in pixels, even.
        grey: gray value, 0 to 255.

    Returns:
        New images, bytes, shape (B, 3, H, W).
    """
    rows = torch.arange(images.shape[2], device=images.device) - row.view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device) - column.view(-1, 1)
    half = side // 2
    inside = ((rows >= -half) & (rows < half))[:, None, :, None] & ((columns >= -half) & (columns < half))[
        :, None, None
    ]
    return images * ~inside + grey * inside.to(torch.uint8)  # four times as fast as masked_fill on the CPU


# Geometric operations ------------------------------------------------------------------------------------------------


def affine_matrix(
    angle: Tensor | float = 0.0,
    translate_x: Tensor | float = 0.0,
    translate_y: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
) -> Tensor:
    """Return affine matrices from output to input coordinates: (B, 2, 3), float32, from (x, y, 1) to (x, y).

    Coordinates are in pixels from the center of the image. Arguments are those of :func:`affine`, each a number or
    (B,).
    """
    given = (angle, scale, shear_x, shear_y, translate_x, translate_y)
    device = next((part.device for part in given if isinstance(part, Tensor)), torch.device("cpu"))
    filled = (part if isinstance(part, Tensor) else torch.full((1,), part, device=device) for part in given)
    turn, larger, sx, sy, across, down = torch.broadcast_tensors(*(part.double() for part in filled))
    turn, sx, sy = (part * (math.pi / 180) for part in (turn, sx, sy))
    # forward: rotation after shear; the determinant is 1, so the inverse needs no division
    a, c = (turn - sy).cos() / sy.cos(), (turn - sy).sin() / sy.cos()
    b, d = -(a * sx.tan() + turn.sin()), turn.cos() - c * sx.tan()
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / larger.view(-1, 1, 1)
    offset = -(inverse * torch.stack([across, down], 1)[:, None]).sum(2)
    return torch.cat([inverse, offset.unsqueeze(2)], 2).float()


def resample(images: Tensor, matrix: Tensor, crop: CropFlip | None = None, padding: int = 0) -> Tensor:
    """Apply an affine transform to each image, with nearest-neighbor interpolation and 0 outside of the image.

    Args:
        images: bytes, shape (B, 3, H, W).
        matrix: from :func:`affine_matrix`, shape (B, 2, 3).
        crop: optional crop and flip of each image before the transform, equal to
            :func:`sanm_lightning.data.views.crop_flip`, which moves whole pixels.
        padding: padding of the crop, in pixels.

    Returns:
        New images, bytes, shape (B, 3, H, W).
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = (torch.arange(height, device=device, dtype=torch.float32) - (height - 1) / 2).view(-1, 1)
    columns = torch.arange(width, device=device, dtype=torch.float32) - (width - 1) / 2

    # No matrix product, which autocast would run in bf16. Scaling to [-1, 1] and back reproduces torchvision's
    # rounding.
    def place(which: int, size: int) -> Tensor:
        across, down, offset = (part.view(-1, 1, 1) for part in (matrix[:, which] * (2 / size)).unbind(1))
        return ((across * columns + (down * rows + offset) + 1) * (size / 2) - 0.5).round_().to(torch.int32)

    x, y = place(0, width), place(1, height)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    if crop is not None:
        top, left, flipped = (part.to(device, non_blocking=True).view(-1, 1, 1) for part in crop)
        x = torch.where(flipped, width - 1 - x, x) + (left - padding).to(torch.int32)
        y = y + (top - padding).to(torch.int32)
        inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = torch.where(inside, y * width + x, 0).view(batch, 1, -1).long()
    moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
    return moved.mul_(inside.unsqueeze(1))


def affine(
    images: Tensor,
    angle: Tensor | float = 0.0,
    translate_x: Tensor | float = 0.0,
    translate_y: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
) -> Tensor:
    """Rotate, translate, scale and shear each image, with nearest-neighbor interpolation and 0 outside of the image.

    Args:
        images: bytes, shape (B, 3, H, W).
        angle: degrees, clockwise as in torchvision's ``affine`` (``rotate`` has the opposite sign).
        translate_x: pixels to the right.
        translate_y: pixels down.
        scale: > 0; 2 enlarges the center by a factor of two.
        shear_x: degrees.
        shear_y: degrees.

    Every parameter is one number, or one per image, shape (B,).

    Returns:
        New images, bytes, shape (B, 3, H, W).
    """
    matrix = affine_matrix(angle, translate_x, translate_y, scale, shear_x, shear_y)
    return resample(images, matrix.to(images.device).expand(len(images), -1, -1))


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop a window from each image and resize it to the image size with bilinear interpolation.

    Args:
        images: bytes, shape (B, 3, H, W).
        top: first row of each window, shape (B,).
        left: first column, shape (B,).
        height: number of rows, shape (B,), 1 to H.
        width: number of columns, shape (B,), 1 to W.

    Returns:
        New images, bytes, shape (B, 3, H, W).
    """
    grids = []
    for size, first, count in ((images.shape[3], left, width), (images.shape[2], top, height)):
        first, count = first.float().view(-1, 1), count.float().view(-1, 1)
        middles = torch.arange(size, device=images.device, dtype=torch.float32) + 0.5
        place = first + torch.minimum((middles * count / size - 0.5).clamp(min=0), count - 1)  # clamped to the window
        grids.append((place + 0.5) * (2 / size) - 1)
    across, down = grids
    shape = (len(images), images.shape[2], images.shape[3])
    grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], 3)
    enlarged = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    return enlarged.round_().clamp_(0, 255).to(torch.uint8)


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
"""Name -> function (images, amount) to tables (B, 3, 256) for :func:`look_up`."""

Move = Callable[[Tensor, tuple[int, int]], Tensor]


def _matrix(amount: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return the identity matrix for each of ``amount`` (B,), with some entries replaced by values (B,)."""
    matrix = torch.eye(2, 3, device=amount.device).repeat(len(amount), 1, 1)
    for (row, column), entry in entries.items():
        matrix[:, row, column] = entry
    return matrix


def _rotate(degrees: Tensor, size: tuple[int, int]) -> Tensor:
    angle = degrees * (math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    return _matrix(degrees, {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine})


MOVES: dict[str, Move] = {
    "rotate": _rotate,
    "shear_x": lambda slope, size: _matrix(slope, {(0, 1): slope, (0, 2): slope * (size[0] / 2)}),
    "shear_y": lambda slope, size: _matrix(slope, {(1, 0): slope, (1, 2): slope * (size[1] / 2)}),
    "translate_x": lambda pixels, size: _matrix(pixels, {(0, 2): -pixels}),
    "translate_y": lambda pixels, size: _matrix(pixels, {(1, 2): -pixels}),
}
"""Name -> function (amount, (H, W)) to matrices (B, 2, 3) for :func:`resample`."""

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


def _by_move(move: Move) -> Operation:
    return lambda images, amount: resample(images, move(amount, (images.shape[2], images.shape[3])))


OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, amount: images,
    **{name: _by_table(table) for name, table in TABLES.items()},
    **{name: _by_move(move) for name, move in MOVES.items()},
    **NEIGHBORS,
}
"""Name -> function (images, amount) of bytes (B, 3, H, W) and one amount per image (B,): a factor, bits, a threshold,
degrees, a slope or pixels. Names as in AutoAugment (Cubuk et al., CVPR 2019); shears keep the upper left corner fixed,
as there. The order is: identity, :data:`TABLES`, :data:`MOVES`, :data:`NEIGHBORS`."""
