"""Geometric operations on batches of uint8 images with one strength per image, on any device.

Affine transforms are those of Pillow: :func:`resample` (nearest neighbor) is equal to the pixel, because it uses the same
fixed-point arithmetic; :func:`shear` (bicubic) is within one gray level. No function synchronizes with the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.data.views import CropFlip

__all__ = ["MOVES", "SHEARS", "affine", "affine_matrix", "resample", "resized_crop", "shear"]


def affine_matrix(
    angle: Tensor | float = 0.0,
    translate_x: Tensor | float = 0.0,
    translate_y: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
) -> Tensor:
    """Return affine matrices from output to input coordinates: (B, 2, 3), float64, from (x, y, 1) to (x, y).

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
    return torch.cat([inverse, offset.unsqueeze(2)], 2)


def _fixed_point(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert matrices (B, 2, 3) for the centers of the pixels to integers with 16 fractional bits, int32, as Pillow does.

    The third column becomes the place of the first pixel, in pixels from the upper left corner of the image.
    """
    across, down, offset = matrix.double().unbind(2)
    middle = [side / 2 for side in reversed(size)]
    first = [
        offset[:, row] + middle[row] + across[:, row] * (0.5 - middle[0]) + down[:, row] * (0.5 - middle[1])
        for row in (0, 1)
    ]
    return (torch.stack([across, down, torch.stack(first, 1)], 2) * 65536 + 0.5).floor().to(torch.int32)


def resample(images: Tensor, matrix: Tensor, crop: CropFlip | None = None, padding: int = 0, fill: int = 0) -> Tensor:
    """Apply an affine transform to each image with nearest-neighbor interpolation, equal to Pillow's to the pixel.

    Args:
        images: bytes, shape (B, C, H, W), H and W at most 8,192.
        matrix: from :func:`affine_matrix`, shape (B, 2, 3). On the CPU it is converted there, and all devices resample
            the same pixels.
        crop: optional crop and flip of each image before the transform, equal to
            :func:`sanm_lightning.data.views.crop_flip`, which moves whole pixels.
        padding: padding of the crop, in pixels.
        fill: gray value outside of the image, 0 to 255; the padding of the crop is 0.

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    batch, _, height, width = images.shape
    device = images.device
    fixed = _fixed_point(matrix, (height, width)).to(device, non_blocking=True)
    rows = torch.arange(height, device=device, dtype=torch.int32).view(-1, 1)
    columns = torch.arange(width, device=device, dtype=torch.int32)

    def place(row: int) -> Tensor:
        across, down, first = (part.view(-1, 1, 1) for part in fixed[:, row].unbind(1))
        return (across * columns + (down * rows + first)) >> 16

    x, y = place(0), place(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    outside = ~inside if fill else None
    if crop is not None:
        top, left, flipped = (part.to(device, non_blocking=True).view(-1, 1, 1) for part in crop)
        x = torch.where(flipped, width - 1 - x, x) + (left - padding).to(torch.int32)
        y = y + (top - padding).to(torch.int32)
        inside &= (x >= 0) & (x < width) & (y >= 0) & (y < height)
    source = torch.where(inside, y * width + x, 0).view(batch, 1, -1).long()
    moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
    moved.mul_(inside.unsqueeze(1))
    return moved if outside is None else moved.add_((outside.to(torch.uint8) * fill).unsqueeze(1))


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
        images: bytes, shape (B, C, H, W).
        angle: degrees, clockwise as in torchvision's ``affine`` (``rotate`` has the opposite sign).
        translate_x: pixels to the right.
        translate_y: pixels down.
        scale: > 0; 2 enlarges the center by a factor of two.
        shear_x: degrees.
        shear_y: degrees.

    Every parameter is one number, or one per image, shape (B,).

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    matrix = affine_matrix(angle, translate_x, translate_y, scale, shear_x, shear_y)
    return resample(images, matrix.expand(len(images), -1, -1))


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Crop a window from each image and resize it to the image size with bilinear interpolation.

    Args:
        images: bytes, shape (B, C, H, W).
        top: first row of each window, shape (B,).
        left: first column, shape (B,).
        height: number of rows, shape (B,), 1 to H.
        width: number of columns, shape (B,), 1 to W.

    Returns:
        New images, bytes, shape (B, C, H, W).
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


def shear(images: Tensor, slope: Tensor, fill: int = 0) -> Tensor:
    """Shear each image along its rows with bicubic interpolation, as Pillow does; the upper left corner stays in place.

    The cubic has the parameter -1 (Pillow's for affine transforms; its resizing has -1/2). Results are rounded down.

    Args:
        images: bytes, shape (B, C, H, W).
        slope: shape (B,). The pixel in row y takes the value ``slope * (y + 1/2)`` pixels to its right.
        fill: gray value outside of the image, 0 to 255.

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    _, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + 0.5
    columns = torch.arange(width, device=images.device)
    shift = slope.view(-1, 1) * rows  # (B, H)
    whole = shift.floor()
    part = (shift - whole)[:, None, :, None]
    second = columns + whole.long().unsqueeze(2)  # (B, H, W)
    before, left, right, after = (
        images.gather(3, (second + tap).clamp_(0, width - 1).unsqueeze(1).expand(-1, channels, -1, -1)).float()
        for tap in (-1, 0, 1, 2)
    )
    cubic = left + part * (
        right - before + part * (2 * (before - left) + right - after + part * (left - before + after - right))
    )
    place = columns + 0.5 + shift.unsqueeze(2)
    inside = ((place >= 0) & (place < width)).unsqueeze(1)
    return torch.where(inside, cubic.clamp_(0, 255), fill).to(torch.uint8)


Move = Callable[[Tensor, tuple[int, int]], Tensor]


def _matrix(amount: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return the identity matrix for each of ``amount`` (B,), with some entries replaced by values (B,)."""
    matrix = torch.eye(2, 3, dtype=torch.float64, device=amount.device).repeat(len(amount), 1, 1)
    for (row, column), entry in entries.items():
        matrix[:, row, column] = entry
    return matrix


def _rotate(degrees: Tensor, size: tuple[int, int]) -> Tensor:
    angle = degrees.double() * (math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    return _matrix(degrees, {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine})


MOVES: dict[str, Move] = {
    "rotate": _rotate,
    "shear_x": lambda slope, size: _matrix(slope, {(0, 1): slope, (0, 2): slope.double() * (size[0] / 2)}),
    "shear_y": lambda slope, size: _matrix(slope, {(1, 0): slope, (1, 2): slope.double() * (size[1] / 2)}),
    "translate_x": lambda pixels, size: _matrix(pixels, {(0, 2): -pixels}),
    "translate_y": lambda pixels, size: _matrix(pixels, {(1, 2): -pixels}),
}
"""Name -> function (amount, (H, W)) to matrices (B, 2, 3) for :func:`resample`."""

SHEARS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "shear_x_bicubic": shear,
    "shear_y_bicubic": lambda images, slope, fill: shear(images.transpose(2, 3), slope, fill).transpose(2, 3),
}
"""Name -> function (images, slope, fill) to images, with bicubic interpolation."""
