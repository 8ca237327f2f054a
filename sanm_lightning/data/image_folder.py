"""Data sets of image files, and image folders with one subfolder per class."""

import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source
from sanm_lightning.data.image_files import (
    PassedOver,
    add_passed_over,
    class_folders,
    count_passed_over,
    list_class_folder,
    split_folders,
)

__all__ = ["ImageFiles", "ImageFolder", "read_image", "unreadable_reason"]

MAX_PIXELS = 2**26
"""Largest number of pixels of a decoded image, because a small file can declare any size (decompression bombs)."""

MAX_ASPECT = 16
"""Largest ratio of the sides of an image before it is resized; the ends of longer images are not part of the square."""

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""Exceptions raised by Pillow; the last one if warnings are errors."""


class ImageFiles(NoisyDataModule):
    """Base class of data sets of image files, which are decoded on access, in any format and mode supported by Pillow.

    Images are rotated according to EXIF, composited on white if transparent, resized to a short side of
    ``decode_size``, and center-cropped to a square. Views of ``image_size`` are random crops of that square in training
    and center crops in evaluation.

    Args:
        root: folder that contains the files; paths are relative to it.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1, or decode_size is smaller than image_size.
    """

    def __init__(
        self, root: str = "data", image_size: int = 224, decode_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root=root, **kwargs)
        if image_size < 1:
            raise ValueError(
                f"expected image_size of 1 pixel or more, got {image_size}; choose a larger one, such as 224"
            )
        if decode_size is not None and decode_size < image_size:
            raise ValueError(
                f"expected decode_size of {image_size}, the image_size, or more, got {decode_size}; choose a larger one"
            )
        self._side = image_size
        self._decoded = image_size if decode_size is None else decode_size

    @property
    def num_classes(self) -> int:
        """The number of class names."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) in pixels."""
        return self._side, self._side

    @property
    def decode_size(self) -> tuple[int, int]:
        """(side, side) of the decoded squares in pixels."""
        return self._decoded, self._decoded

    @property
    def curated(self) -> bool:
        """False: the given labels may be wrong."""
        return False

    def source(self, split: str) -> Source:
        """List the files of ``train``, ``val`` or ``test``."""
        raise NotImplementedError

    def load_train(self) -> Source:
        """Return the training files."""
        return self.source("train")

    def load_val(self) -> Source:
        """Return the validation files."""
        return self.source("val")

    def load_test(self) -> Source:
        """Return the test files."""
        return self.source("test")

    def _made(self, split: str, files: list[Path], labels: list[int], paths: list[str], more: str = "") -> Source:
        """Create a source and log its size."""
        self._say(f"{split}: {len(files)} images of {len(set(labels))} classes{more and ', ' + more}")
        return Source(torch.tensor(labels, dtype=torch.int64), _Files(files, self._decoded), paths)


class ImageFolder(ImageFiles):
    """Images in ``root/train/<class>/`` and, optionally, ``root/val/<class>/`` and ``root/test/<class>/``.

    Classes are the subfolders of ``root/train``, sorted by name, and are searched recursively. Other files are skipped,
    and their number is logged; see `list_class_folder`. A root of class folders, without ``train``, is a training set.
    Without a test and a validation folder, a fraction of the training set is held out (``holdout_fraction``). The
    labels are those of the folders; the true labels are unknown, unless this data module injects noise.

    Args:
        root: folder that contains ``train`` or class folders.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1; on access, if there are no classes, a class has no images, a class
            of another split is not a training class, or a file cannot be decoded.
        FileNotFoundError: on access, if the folder does not exist or has no training set.
    """

    def __init__(
        self, root: str = "data", image_size: int = 224, decode_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root=root, image_size=image_size, decode_size=decode_size, **kwargs)
        self._found: tuple[dict[str, list[Path]], PassedOver] | None = None
        self._class_names: list[str] | None = None
        self._own_splits: tuple[str, ...] | None = None

    @property
    def class_names(self) -> list[str]:
        """The class folders of the training set, sorted."""
        if self._class_names is None:
            names = {name for base in self._folders()["train"] for name in class_folders(base)[0]}
            self._class_names = sorted(names)
        return list(self._class_names)

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``, if their folders contain class folders."""
        if self._own_splits is None:
            self._own_splits = tuple(
                split
                for split, bases in self._folders().items()
                if split != "train" and any(class_folders(base, required=False)[0] for base in bases)
            )
        return self._own_splits

    def source(self, split: str) -> Source:
        """List the files of ``train``, ``val`` or ``test``."""
        label_of = {name: label for label, name in enumerate(self.class_names)}
        found: list[Path] = []
        labels: list[int] = []
        passed_over: PassedOver = {}
        if split == "train" and self._found is not None:
            add_passed_over(passed_over, self._found[1])
        for base in self._folders()[split]:
            names, loose = class_folders(base)
            add_passed_over(passed_over, loose)
            for name in names:
                if name not in label_of:
                    raise ValueError(
                        f"expected {split} classes among the {len(label_of)} training classes, got {name!r}; rename or "
                        f"remove {str(base / name)!r}"
                    )
                files, others = list_class_folder(base / name)
                if not files:
                    raise ValueError(
                        f"expected images in {str(base / name)!r}, got none "
                        f"({count_passed_over(others) or 'empty folder'}); add images, or remove the folder"
                    )
                add_passed_over(passed_over, others)
                found += files
                labels += [label_of[name]] * len(files)
        paths = [path.relative_to(self.root).as_posix() for path in found]
        return self._made(split, found, labels, paths, count_passed_over(passed_over))

    def _folders(self) -> dict[str, list[Path]]:
        """Return the folders of each split; a root of class folders is a training set."""
        if self._found is None:
            parts, passed_over = split_folders(self.root)
            self._found = {"train" if split == "all" else split: bases for split, bases in parts.items()}, passed_over
        return self._found[0]


class _Files:
    """Map-style data set that decodes file i on access."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths = paths
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.side)


def read_image(
    path: str | Path | BinaryIO, side: int, interpolation: TF.InterpolationMode = TF.InterpolationMode.BILINEAR
) -> Tensor:
    """Decode an image file, or the first frame of an animation, to a square RGB image.

    Gray values of more than 8 bits are scaled to 8 bits. The assumed range of integers is 65,535, or their maximum if
    it is larger; that of floating-point values is the smallest of 1, 255 and 65,535 that is not exceeded, or their
    maximum. Negative values and NaN become black.

    Args:
        path: path of the file, or a binary file object.
        side: S, side of the result in pixels.
        interpolation: torchvision interpolation mode of the resize.

    Returns:
        The image, shape (3, S, S), uint8.

    Raises:
        ValueError: if the file cannot be decoded, or has more than ``MAX_PIXELS`` pixels; the message contains the
            path.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # orientation metadata may follow the pixel data
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # exif_transpose also copies upright images
            rgb = _to_rgb(ImageOps.exif_transpose(image) if turned else image)
    except UNREADABLE as error:
        raise ValueError(
            f"expected a valid image, got {str(path)!r}, which cannot be decoded ({str(error).rstrip('.')}); replace "
            "or remove the file"
        ) from error
    resized = TF.resize(_without_far_ends(rgb), [side], interpolation=interpolation, antialias=True)
    square = resized if resized.size == (side, side) else TF.center_crop(resized, [side, side])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def unreadable_reason(error: ValueError) -> str:
    """Return the reason in an error of :func:`read_image`, without the path of the file.

    Args:
        error: the raised error.
    """
    cause = error.__cause__ or error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    text = re.sub(r" (<_io\.BytesIO object at \w+>|'[^']*'|\"[^\"]*\")$", "", text)  # Pillow repeats the file
    return text.rstrip(".") or type(cause).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    largest = float(values.max())
    scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    scale = next((scale for scale in scales if largest <= scale), largest)
    return Image.fromarray((values * (255 / scale)).round().astype(np.uint8))
