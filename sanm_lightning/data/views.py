"""Random crops and flips of a batch of images: sample the parameters of each image, then apply them to the batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CropFlip", "crop_flip", "draw_crop_flip", "select_rows"]


LARGE = 3 * 64 * 64
"""Number of values from which on the views of an image are copied row by row on the CPU."""


class CropFlip(NamedTuple):
    """One crop and flip per image.

    Attributes:
        top: first row of the crop in the padded image, shape (B,), int64, in [0, 2 * padding].
        left: first column of the crop, shape (B,), int64, in the same range.
        flipped: whether the crop is flipped horizontally, shape (B,), bool.
    """

    top: Tensor
    left: Tensor
    flipped: Tensor


def draw_crop_flip(
    batch: int, padding: int, flip: bool, generator: torch.Generator, rest: tuple[int, int] = (0, 0)
) -> CropFlip:
    """Sample uniform crop positions, and flips with probability 1/2 if ``flip``.

    The same random numbers are consumed with and without flips, so the crops do not depend on ``flip``.

    Args:
        batch: B, number of images.
        padding: pixels added on each side, 0 or more; 0 means no shift.
        flip: whether to flip images horizontally at random.
        generator: random generator; the result is on its device.
        rest: rows and columns by which the images exceed the crops.

    Returns:
        Parameters of B views.

    Raises:
        ValueError: if padding is negative.
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
    """Pad each image with zeros, crop a window (default: the original size), and flip it as in ``parameters``.

    Equal to ``pad``, ``crop`` and ``hflip`` of torchvision, applied to each image, on any device and for any dtype.

    Args:
        images: shape (B, C, H, W).
        parameters: one view per image, from `draw_crop_flip` with the same padding.
        padding: pixels added on each side.
        size: h, w of the views; None uses the size of the images.

    Returns:
        Views, shape (B, C, h, w), dtype and device of the images.

    Raises:
        ValueError: if images are not four-dimensional, the number of views differs, or padding is negative.
    """
    _check_padding(padding)
    if images.dim() != 4 or len(parameters.top) != len(images):
        raise ValueError(
            f"expected images (B, C, H, W) and B views, got {tuple(images.shape)} and {len(parameters.top)} views; "
            "sample one view per image"
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

    Large images on the CPU are copied with NumPy: torch would use all threads, which compete with the decoding workers.
    """
    if images.device.type == "cpu" and images.dtype == torch.uint8 and images[:1].numel() >= LARGE:
        return torch.from_numpy(images.numpy().take(index.numpy(), axis=0))
    return images.index_select(0, index)


def _window_by_window(padded: Tensor, parameters: CropFlip, height: int, width: int) -> Tensor:
    """Copy whole rows, which is several times faster on the CPU than gathering the pixels of large images.

    It uses NumPy, because torch would use all threads, which compete with the decoding workers.
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
