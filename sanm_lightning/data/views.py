"""Random views of a batch of images: first draw the parameters of every image, then apply them to the whole batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CropFlip", "crop_flip", "draw_crop_flip"]


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


def draw_crop_flip(batch: int, padding: int, flip: bool, generator: torch.Generator) -> CropFlip:
    """Uniform crop positions, and a flip with probability 1/2 where flips are asked for.

    The same numbers are drawn with and without flips, so switching flips off leaves the crops as they were.

    Args:
        batch: B.
        padding: pixels added on each side, 0 or more; 0 means no shift.
        flip: whether images may be mirrored.
        generator: source of all randomness; the result lies on its device.

    Returns:
        Parameters of B views.

    Raises:
        ValueError: padding is negative.
    """
    _check_padding(padding)
    device = generator.device
    offsets = torch.randint(2 * padding + 1, (2, batch), generator=generator, device=device)
    coin = torch.rand(batch, generator=generator, device=device) < 0.5
    return CropFlip(offsets[0], offsets[1], coin if flip else torch.zeros_like(coin))


def crop_flip(images: Tensor, parameters: CropFlip, padding: int) -> Tensor:
    """Pads every image with zeros, cuts out a window of the original size, and mirrors it where asked.

    Equal to ``pad``, ``crop`` and ``hflip`` of torchvision, image by image, on any device and for any type.

    Args:
        images: shape (B, C, H, W).
        parameters: one view per image, from `draw_crop_flip` with the same padding.
        padding: pixels added on each side.

    Returns:
        Views, shape (B, C, H, W), type and device of the images.

    Raises:
        ValueError: images are not four-dimensional, the number of views differs, or padding is negative.
    """
    _check_padding(padding)
    if images.dim() != 4 or len(parameters.top) != len(images):
        raise ValueError(
            f"Images of shape (B, C, H, W) and B views are expected, got shape {tuple(images.shape)} and "
            f"{len(parameters.top)} views: draw one view per image."
        )
    top, left, flipped = (values.to(images.device, non_blocking=True) for values in parameters)
    if padding:
        # All windows are strided views of the padded batch; one look-up copies the B that were drawn, and no index as large as
        # the images is built.
        height, width = images.shape[-2:]
        windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = windows[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def _check_padding(padding: int) -> None:
    if padding < 0:
        raise ValueError(f"The crop padding must be 0 or more pixels, got {padding}: use 0 for no crop.")
