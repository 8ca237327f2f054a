"""Image operations on a whole batch of bytes, each image with a strength of its own, on any device.

Each equals the function of ``torchvision.transforms.v2.functional`` with the same name, image by image: the same rounding, and
for what moves pixels the nearest one. Strengths are float32 tensors (B,); no function waits for the device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

__all__ = [
    "OPERATIONS",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "adjust_sharpness",
    "affine",
    "cutout",
    "posterize",
    "resized_crop",
    "solarize",
]


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) -> luma (B, 1, H, W), float32, whole numbers."""
    red, green, blue = images.float().split(1, dim=1)
    luma: Tensor = 0.2989 * red + 0.587 * green + 0.114 * blue
    return luma.floor_()


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return other + factor (images - other), cut off at 0 and 255, as bytes."""
    share = _each(factor)
    return (images * share).add_(other * (1 - share)).clamp_(0, 255).to(torch.uint8)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) times ``factor`` (B,), >= 0."""
    return (images * _each(factor)).clamp_(0, 255).to(torch.uint8)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with their luma: ``factor`` (B,), 0 is grey, 1 the image."""
    return _blend(images, _grey(images), factor)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with their mean luma: ``factor`` (B,), 0 is flat, 1 the image."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend bytes (B, 3, H, W) with a smoothed copy: ``factor`` (B,), 0 is smooth, 1 the image. The edge stays as it is."""
    if min(images.shape[2:]) <= 2:
        return images
    whole = images.to(torch.int16)
    rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    middle = whole[..., 1:-1, 1:-1]
    smooth = (
        (box + 4 * middle) / 13
    ).round_()  # the middle counts 5 of 13, each neighbour 1; a sum over 13 is never a tie
    out = images.clone()
    out[..., 1:-1, 1:-1] = (middle + (smooth - middle) * (1 - _each(factor))).clamp_(0, 255).to(torch.uint8)
    return out


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of bytes (B, 3, H, W) by ``shift`` (B,) turns, in [-0.5, 0.5]."""
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
    # How far each channel lies below the value, none to all: by the distance of the hue from the channel's opposite, in sixths.
    away = torch.stack([turned + 3, turned + 1, turned - 1], dim=1)
    share = (2 - (away - 6 * (away / 6).round_()).abs_()).clamp_(0, 1)
    out = value.unsqueeze(1) - spread.unsqueeze(1) * share
    return out.mul_(256 - 1e-3).clamp_(0, 255).to(torch.uint8)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (B,), 0 to 8, of each byte."""
    dropped = _each(8 - bits.round().to(torch.int32))
    return ((images.to(torch.int32) >> dropped) << dropped).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the bytes that are ``threshold`` (B,) or more."""
    return torch.where(images >= _each(threshold), 255 - images, images)


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int, grey: int = 127) -> Tensor:
    """Paint a square of one grey over each image, clipped at the border.

    Args:
        images: bytes, shape (B, 3, H, W).
        row: of the pixel right below the middle, shape (B,).
        column: of the pixel right of the middle, shape (B,).
        side: of the square in pixels, even.
        grey: 0 to 255.
    """
    rows = torch.arange(images.shape[2], device=images.device) - row.view(-1, 1)
    columns = torch.arange(images.shape[3], device=images.device) - column.view(-1, 1)
    half = side // 2
    inside = ((rows >= -half) & (rows < half))[:, None, :, None] & ((columns >= -half) & (columns < half))[
        :, None, None
    ]
    return images.masked_fill(inside, grey)


def affine(
    images: Tensor,
    angle: Tensor | float = 0.0,
    translate_x: Tensor | float = 0.0,
    translate_y: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
    corner: bool = False,
) -> Tensor:
    """Rotate, shift, scale and shear each image; the nearest pixel is taken, and what comes from outside is 0.

    Args:
        images: bytes, shape (B, 3, H, W).
        angle: degrees, clockwise as torchvision's ``affine`` has it (its ``rotate`` turns the other way).
        translate_x: pixels to the right.
        translate_y: pixels down.
        scale: > 0; 2 shows the middle twice as large.
        shear_x: degrees.
        shear_y: degrees.
        corner: turn and shear about the upper left corner in place of the middle.

    Every parameter is one number, or one per image, shape (B,).
    """
    height, width = images.shape[2:]
    parts = [torch.as_tensor(part, device=images.device).double() for part in (angle, scale, shear_x, shear_y)]
    turn, size, sx, sy = (part.expand(len(images)) for part in parts)
    turn, sx, sy = (part * (math.pi / 180) for part in (turn, sx, sy))
    # forward: rotation after shear; its determinant is 1, so that its inverse needs no division
    a, c = (turn - sy).cos() / sy.cos(), (turn - sy).sin() / sy.cos()
    b, d = -(a * sx.tan() + turn.sin()), turn.cos() - c * sx.tan()
    inverse = torch.stack([d, -b, -c, a], 1).view(-1, 2, 2) / size.view(-1, 1, 1)
    fixed = inverse.new_tensor([-width / 2, -height / 2]) if corner else inverse.new_zeros(2)  # seen from the middle
    moves = [torch.as_tensor(part, device=images.device).double() for part in (translate_x, translate_y)]
    shift = torch.stack([part.expand(len(images)) for part in moves], 1)
    offset = fixed - (inverse @ (fixed + shift).unsqueeze(2)).squeeze(2)
    theta = torch.cat(
        [inverse, offset.unsqueeze(2)], 2
    ).float()  # output place -> input place, in pixels from the middle
    rows = torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2
    columns = torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2
    place = (columns.expand(height, -1), rows[:, None].expand(-1, width), columns.new_ones(height, width))
    places = torch.stack(place, 2)
    half = theta.new_tensor([width / 2, height / 2])
    grid = places.view(1, -1, 3).expand(len(images), -1, -1) @ (theta.transpose(1, 2) / half)
    moved = F.grid_sample(images.float(), grid.view(-1, height, width, 2), "nearest", "zeros", align_corners=False)
    return moved.to(torch.uint8)


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Cut a window out of each image and enlarge it to the image's size, bilinearly.

    Args:
        images: bytes, shape (B, 3, H, W).
        top: first row of each window, shape (B,).
        left: first column, shape (B,).
        height: rows, shape (B,), 1 to H.
        width: columns, shape (B,), 1 to W.
    """
    grids = []
    for size, first, count in ((images.shape[3], left, width), (images.shape[2], top, height)):
        first, count = first.float().view(-1, 1), count.float().view(-1, 1)
        middles = torch.arange(size, device=images.device, dtype=torch.float32) + 0.5
        place = first + torch.minimum((middles * count / size - 0.5).clamp(min=0), count - 1)  # never beyond the window
        grids.append((place + 0.5) * (2 / size) - 1)
    across, down = grids
    shape = (len(images), images.shape[2], images.shape[3])
    grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], 3)
    enlarged = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    return enlarged.round_().clamp_(0, 255).to(torch.uint8)


def _degrees(slope: Tensor) -> Tensor:
    return slope.atan() * (180 / math.pi)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda images, amount: images,
    "autocontrast": lambda images, amount: V.autocontrast(images),
    "equalize": lambda images, amount: V.equalize(images),
    "invert": lambda images, amount: 255 - images,
    "grey": lambda images, amount: _grey(images).to(torch.uint8).expand_as(images),
    "brightness": adjust_brightness,
    "saturation": adjust_saturation,
    "contrast": adjust_contrast,
    "sharpness": adjust_sharpness,
    "hue": adjust_hue,
    "posterize": posterize,
    "solarize": solarize,
    "rotate": lambda images, amount: affine(images, angle=-amount),
    "shear_x": lambda images, amount: affine(images, shear_x=_degrees(amount), corner=True),
    "shear_y": lambda images, amount: affine(images, shear_y=_degrees(amount), corner=True),
    "translate_x": lambda images, amount: affine(images, translate_x=amount),
    "translate_y": lambda images, amount: affine(images, translate_y=amount),
}
"""Name -> function (images, amount) of bytes (B, 3, H, W) and one amount per image (B,): a factor, bits, a threshold, degrees,
a slope, pixels. Names as in AutoAugment (Cubuk et al., CVPR 2019); shears keep the upper left corner, as there."""
