"""Decode image files and images in memory to squares of bytes."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

__all__ = [
    "MODES",
    "UNREADABLE",
    "ImageFileList",
    "Resize",
    "check_decoding",
    "read_image",
    "square_image",
    "unreadable_reason",
]

MAX_PIXELS = 2**26
"""Largest number of pixels of a decoded image, because a small file can declare any size (decompression bombs)."""

MAX_ASPECT = 16
"""Largest ratio of the sides of an image before it is resized; the ends of longer images are not part of the square."""

DRAFT = 2
"""JPEG files are decoded at the smallest of 1/8, 1/4, 1/2 and 1 of their size at which no side is below this multiple of the
side of the result, as in Pillow's ``Image.thumbnail``."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Exceptions raised by Pillow; the last one if warnings are errors."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of decoded images by number of channels."""

Resize = Literal["crop", "stretch"]
"""``crop`` resizes the short side and crops the center; ``stretch`` resizes both sides, which changes the aspect."""


class ImageFileList:
    """Map-style data set that decodes file i on access.

    Args:
        paths: N paths.
        side: S, side of the decoded squares in pixels.
        channels: number of channels, 1 to 4.
        resize: how other aspects become squares.
    """

    def __init__(self, paths: Sequence[str | Path], side: int, channels: int = 3, resize: Resize = "crop") -> None:
        self.paths, self.side, self.channels, self.resize = paths, side, channels, resize

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.side, channels=self.channels, resize=self.resize)


def check_decoding(channels: int, resize: str) -> None:
    """Check the arguments of :func:`square_image`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if channels not in MODES:
        raise ValueError(
            f"expected channels of 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA), got {channels}; choose one of them"
        )
    if resize not in get_args(Resize):
        raise ValueError(f"expected resize 'crop' or 'stretch', got {resize!r}; choose one of them")


def read_image(
    path: str | Path | BinaryIO,
    side: int,
    interpolation: TF.InterpolationMode = TF.InterpolationMode.BILINEAR,
    channels: int = 3,
    resize: Resize = "crop",
) -> Tensor:
    """Decode an image file, or the first frame of an animation, to a square image.

    Large JPEG files are decoded at a fraction of their size, see ``DRAFT``, which takes a fraction of the time and changes
    values by one or two levels of 255 on average.

    Args:
        path: path of the file, or a binary file object.
        side: S, side of the result in pixels.
        interpolation: torchvision interpolation mode of the resize.
        channels: C, see :func:`square_image`.
        resize: see :func:`square_image`.

    Returns:
        The image, shape (C, S, S), uint8.

    Raises:
        ValueError: if the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels; the message contains the
            path.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.draft(None, (DRAFT * side, DRAFT * side))  # changes JPEG files only
            try:
                image.load()  # orientation metadata may follow the pixel data
            except RuntimeError as error:  # of the decoder of AVIF
                raise ValueError(str(error)) from error
            return square_image(image, side, interpolation, channels, resize)
    except UNREADABLE as error:
        cause = ValueError("the file is empty") if _is_empty(path) else error
        raise ValueError(
            f"expected a valid image, got {str(path)!r}, which cannot be decoded ({str(cause).rstrip('.')}); replace "
            "or remove the file"
        ) from cause


def square_image(
    image: Image.Image,
    side: int,
    interpolation: TF.InterpolationMode = TF.InterpolationMode.BILINEAR,
    channels: int = 3,
    resize: Resize = "crop",
) -> Tensor:
    """Convert an image of any mode and size to a square of bytes.

    The image is rotated according to EXIF, and composited on white if it is transparent and the result has no alpha.
    Gray values of more than 8 bits are scaled to 8 bits. The assumed range of integers is 65,535, or their maximum if
    it is larger; that of floating-point values is the smallest of 1, 255 and 65,535 that is not exceeded, or their
    maximum. Negative values and NaN become black.

    Args:
        image: a loaded image.
        side: S, side of the result in pixels.
        interpolation: torchvision interpolation mode of the resize.
        channels: C, 1 (gray, the luma of color images), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
        resize: ``crop`` resizes the short side and crops the center, ``stretch`` resizes both sides.

    Returns:
        The image, shape (C, S, S), uint8.
    """
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # exif_transpose also copies upright images
    converted = _convert(ImageOps.exif_transpose(image) if turned else image, MODES[channels])
    if resize == "stretch":
        square = TF.resize(converted, [side, side], interpolation=interpolation, antialias=True)
    else:
        square = TF.resize(_without_far_ends(converted), [side], interpolation=interpolation, antialias=True)
        square = square if square.size == (side, side) else TF.center_crop(square, [side, side])
    pixels = np.asarray(square).reshape(side, side, channels)
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # faster than torch's contiguous()


def unreadable_reason(error: ValueError) -> str:
    """Return the reason in an error of :func:`read_image`, without the path of the file.

    Args:
        error: the raised error.
    """
    cause = error.__cause__ or error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    text = re.sub(r" (<_io\.BytesIO object at \w+>|'[^']*'|\"[^\"]*\")$", "", text)  # Pillow repeats the file
    return text.rstrip(".") or type(cause).__name__


def _is_empty(path: str | Path | BinaryIO) -> bool:
    return isinstance(path, (str, Path)) and os.path.isfile(path) and os.path.getsize(path) == 0


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert(mode)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if "A" not in mode:
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return layer.convert(mode)
    if image.mode in ("1", "L", mode):
        return image if image.mode == mode else image.convert(mode)
    return image.convert("RGB").convert(mode)  # Pillow has no direct conversion for some pairs


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Crop images of an aspect ratio above ``MAX_ASPECT`` at both ends, whose resized size has no bound otherwise."""
    short = min(image.size)
    width, height = (min(length, MAX_ASPECT * short) for length in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values to 8 bits; Pillow's own conversion clips at 255."""
    values: Any = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    largest = float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    scale = next((scale for scale in scales if largest <= scale), largest)
    return Image.fromarray((values * (255 / scale)).round().astype(np.uint8))
