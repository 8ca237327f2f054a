"""Original data sets, before subset, noise and splits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sanm_lightning.data.rows import ImageDataset

__all__ = ["Source", "check_source"]


class Source(NamedTuple):
    """Labels and images of an original data set, before subset, noise and splits.

    Attributes:
        labels: class indices, shape (N,), int64.
        images: shape (N, 3, H, W), uint8; or a map-style data set that decodes image i to (3, H, W), uint8, on access.
        paths: path of the file of each sample, relative to the root of the data set, with ``/``; None without files.
    """

    labels: Tensor
    images: Tensor | ImageDataset
    paths: Sequence[str] | None = None


def check_source(source: Source, num_classes: int, size: tuple[int, int], what: str) -> None:
    """Check the types, shapes and ranges of a data set.

    Args:
        source: the data set.
        num_classes: C, number of classes.
        size: H, W of the images in pixels.
        what: name of the data set for error messages.

    Raises:
        ValueError: if the labels or images are invalid.
    """
    labels, images, paths = source
    if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0 or len(images) != len(labels):
        raise ValueError(
            f"expected int64 labels (N,) for the {len(images)} images of the {what} set, got {tuple(labels.shape)} of "
            f"{labels.dtype}; return one label per image"
        )
    if paths is not None and len(paths) != len(labels):
        raise ValueError(
            f"expected one path for each of the {len(labels)} images of the {what} set, got {len(paths)}; return all "
            "paths or none"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"expected labels in 0 to {num_classes - 1} in the {what} set, got {int(labels.min())} to "
            f"{int(labels.max())}; number the classes from 0 and check num_classes"
        )
    height, width = size
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.shape[1:] != (3, height, width)):
        raise ValueError(
            f"expected uint8 images (N, 3, {height}, {width}) in the {what} set, got {tuple(images.shape)} of "
            f"{images.dtype}; convert them"
        )
