"""Random views of a batch of images: first draw the parameters of every image, then apply them to the whole batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CropFlip", "crop_flip", "draw_crop_flip", "select_rows"]


LARGE = 3 * 64 * 64
"""Values of an image from which on its views are copied line by line on a processor."""


class CropFlip(NamedTuple):
    """One crop and flip per image.

    Attributes:
        top: first row of the crop in the padded image, shape (B,), int64, in [0, 2 * padding].
        left: first column likewise, shape (B,), int64.
        flipped: True where the crop is mirrored left to right, shape (B,), bool.
    """

    top: Tensor
    left: Tensor
    flipped: Tensor


def draw_crop_flip(
    batch: int, padding: int, flip: bool, generator: torch.Generator, rest: tuple[int, int] = (0, 0)
) -> CropFlip:
    """Uniform crop positions, and a flip with probability 1/2 where flips are asked for.

    The same numbers are drawn with and without flips, so switching flips off leaves the crops as they were.

    Args:
        batch: B.
        padding: pixels added on each side, 0 or more; 0 means no shift.
        flip: whether images may be mirrored.
        generator: source of all randomness; the result lies on its device.
        rest: rows and columns by which the images are larger than the crops.

    Returns:
        Parameters of B views.

    Raises:
        ValueError: padding is negative.
    """
    _check_padding(padding)
    device = generator.device
    if rest == (0, 0):
        offsets = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=device)
    else:
        places = torch.tensor([[2 * padding + 1 + more] for more in rest], device=device)
        drawn = torch.rand((2, batch), generator=generator, device=device, dtype=torch.float64)
        offsets = (drawn * places).long()
    coin = torch.rand(batch, generator=generator, device=device) < 0.5
    return CropFlip(offsets[0], offsets[1], coin if flip else torch.zeros_like(coin))


def crop_flip(images: Tensor, parameters: CropFlip, padding: int, size: tuple[int, int] | None = None) -> Tensor:
    """Pads every image with zeros, cuts out a window, of the original size by default, and mirrors it where asked.

    Equal to ``pad``, ``crop`` and ``hflip`` of torchvision, image by image, on any device and for any type.

    Args:
        images: shape (B, C, H, W).
        parameters: one view per image, from `draw_crop_flip` with the same padding.
        padding: pixels added on each side.
        size: h, w of the views; None takes the size of the images.

    Returns:
        Views, shape (B, C, h, w), type and device of the images.

    Raises:
        ValueError: images are not four-dimensional, the number of views differs, or padding is negative.
    """
    _check_padding(padding)
    if images.dim() != 4 or len(parameters.top) != len(images):
        raise ValueError(
            f"expected images (B, C, H, W) and B views, got {tuple(images.shape)} and {len(parameters.top)} views; draw one "
            "view per image"
        )
    height, width = images.shape[2:] if size is None else size
    padded = F.pad(images, (padding,) * 4) if padding else images
    if images.device.type == "cpu" and images.dtype == torch.uint8 and images[:1].numel() >= LARGE:
        return _window_by_window(padded, parameters, height, width)
    top, left, flipped = (values.to(images.device, non_blocking=True).unsqueeze(1) for values in parameters)
    columns = torch.arange(width, device=images.device)
    columns = left + torch.where(flipped, columns.flip(0), columns)  # (B, W), in the padded image
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    source = (rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)).view(len(images), 1, height * width)
    return padded.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view(*images.shape[:2], height, width)


def select_rows(images: Tensor, index: Tensor) -> Tensor:
    """Return the images at positions (K,), on their device; equal to ``images.index_select(0, index)``.

    Large images on a processor are copied with NumPy: torch would start all its threads for each of them, which the workers
    that decode are in the way of.
    """
    if images.device.type == "cpu" and images.dtype == torch.uint8 and images[:1].numel() >= LARGE:
        return torch.from_numpy(images.numpy().take(index.numpy(), axis=0))
    return images.index_select(0, index)


def _window_by_window(padded: Tensor, parameters: CropFlip, height: int, width: int) -> Tensor:
    """Copy whole lines, which on a processor is several times faster than to gather the pixels of large images.

    With NumPy: torch would start all its threads for each image, which the workers that decode are in the way of.
    """
    views = padded.new_empty((len(padded), padded.shape[1], height, width))
    places = zip(views.numpy(), padded.numpy(), *(part.tolist() for part in parameters), strict=True)
    for view, image, top, left, flipped in places:
        window = image[:, top : top + height, left : left + width]
        view[...] = window[:, :, ::-1] if flipped else window
    return views


def _check_padding(padding: int) -> None:
    if padding < 0:
        raise ValueError(f"expected a crop padding of 0 pixels or more, got {padding}; use 0 for no crop")
