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
        images: shape (N, C, H, W), uint8; or a map-style data set that decodes image i to (C, H, W), uint8, on access.
        paths: path of the file of each sample, relative to the root of the data set, with ``/``; None without files.
        true_labels: true labels, shape (N,), int64, if ``labels`` are known to be noisy; None otherwise.
        left_out: paths of samples that are not part of the set, such as unreadable files; label files may contain them.
    """

    labels: Tensor
    images: Tensor | ImageDataset
    paths: Sequence[str] | None = None
    true_labels: Tensor | None = None
    left_out: tuple[str, ...] = ()


def check_source(source: Source, num_classes: int, size: tuple[int, int], what: str, channels: int = 3) -> None:
    """Check the types, shapes and ranges of a data set.

    Args:
        source: the data set.
        num_classes: number of classes.
        size: H, W of the images in pixels.
        what: name of the data set for error messages.
        channels: C, number of channels of the images.

    Raises:
        ValueError: if the labels or images are invalid, or the training set has fewer than two classes.
    """
    labels, images, paths, true_labels = source[:4]
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
    if num_classes < 2 and what == "training":
        raise ValueError(
            f"expected two or more classes in the {what} set, got {num_classes}; add images of another class"
        )
    if true_labels is not None and (true_labels.shape != labels.shape or true_labels.dtype != torch.int64):
        raise ValueError(
            f"expected int64 true labels of shape {tuple(labels.shape)} in the {what} set, got {tuple(true_labels.shape)} of "
            f"{true_labels.dtype}; return one per image"
        )
    height, width = size
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.shape[1:] != (channels, height, width)):
        raise ValueError(
            f"expected uint8 images (N, {channels}, {height}, {width}) in the {what} set, got {tuple(images.shape)} of "
            f"{images.dtype}; convert them"
        )
