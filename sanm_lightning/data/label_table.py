"""Labels of a training set: subset, noise, validation split. Independent of images and trainer."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanm_lightning.data.noise import Noise
from sanm_lightning.random_streams import named_generator
from sanm_lightning.safe_files import atomic_write

__all__ = ["LabelTable", "balanced_subset", "label_tables", "save_label_table"]


class LabelTable(NamedTuple):
    """The labels of one split.

    Attributes:
        labels: given labels, shape (n,), int64.
        true_labels: true labels, shape (n,), int64; None if unknown.
        origin: position of each sample in the original set, shape (n,), int64.
    """

    labels: Tensor
    true_labels: Tensor | None
    origin: Tensor

    @property
    def noise_rate(self) -> float | None:
        """Fraction of the given labels that are wrong, in [0, 1]; None if the true labels are unknown."""
        if self.true_labels is None:
            return None
        return (self.labels != self.true_labels).double().mean().item()

    def check_sum(self) -> int:
        """Return a checksum of labels and sample positions."""
        return zlib.crc32(torch.stack([self.labels, self.origin]).numpy().tobytes())


def balanced_subset(labels: Tensor, size: int, num_classes: int, seed: int) -> Tensor:
    """Choose a random subset with equal class sizes; classes with too few samples are included completely.

    Args:
        labels: shape (N,), int64.
        size: n, from the number of classes to N.
        num_classes: C, number of classes.
        seed: random seed.

    Returns:
        Positions, shape (n,), sorted.

    Raises:
        ValueError: if ``size`` is out of its range.
    """
    if not num_classes <= size <= len(labels):
        raise ValueError(
            f"expected max_train_samples from {num_classes}, the number of classes, to {len(labels)}, the size of the "
            f"training set, got {size}; choose a number in this range, or null for the whole set"
        )
    order = torch.randperm(len(labels), generator=named_generator("subset", seed))
    # Rank the samples of each class in random order, and take all samples of rank 0, then of rank 1, and so on.
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount(minlength=num_classes)
    number = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    rank = torch.empty_like(number)
    rank[by_class] = number
    return order[rank[order].argsort(stable=True)[:size]].sort().values


def label_tables(
    labels: Tensor,
    num_classes: int,
    seed: int,
    noise: Noise,
    max_train_samples: int | None = None,
    val_fraction: float = 0.0,
    curated: bool = True,
    images: Callable[[Tensor], Any] | None = None,
) -> dict[str, LabelTable]:
    """Create the labels of the training split, and of the validation split if one is held out.

    Args:
        labels: labels of the original set, shape (N,), int64.
        num_classes: C, number of classes.
        seed: seed of subset and split, and of noise without a ``seed``.
        noise: label noise.
        max_train_samples: size of a class-balanced subset; None uses all samples.
        val_fraction: fraction that is held out with its noisy labels, in [0, 1).
        curated: whether the labels of the original set are known to be correct.
        images: function that decodes the images at given positions; called by instance-dependent noise only.

    Returns:
        The tables by split name.

    Raises:
        ValueError: if a split would be empty, or an argument is out of its range.
    """
    everything = torch.arange(len(labels))
    kept = everything if max_train_samples is None else balanced_subset(labels, max_train_samples, num_classes, seed)
    if noise.kind == "file":  # a file contains the labels of the whole original set
        given = noise.apply(labels, num_classes, seed)[kept]
    else:
        given = noise.apply(labels[kept], num_classes, seed, None if images is None else partial(images, kept))
    injected = noise.kind not in ("none", "file")
    true = labels[kept] if curated or injected else None
    order = torch.randperm(len(kept), generator=named_generator("split", seed))
    held_out = round(val_fraction * len(kept))
    if val_fraction > 0 and not 0 < held_out < len(kept):
        raise ValueError(
            f"expected a val_fraction with samples in both splits, got {val_fraction}, which gives {held_out} samples "
            f"for validation and {len(kept) - held_out} for training; choose another val_fraction"
        )
    # Sorted: without a subset and a validation split, index i is image i of the data set.
    rows = {"train": order[held_out:].sort().values}
    if held_out:
        rows["val"] = order[:held_out].sort().values
    return {name: LabelTable(given[row], None if true is None else true[row], kept[row]) for name, row in rows.items()}


def save_label_table(
    path: str | Path, table: LabelTable, class_names: list[str], noise_kind: str, noise_rate: float | None, seed: int
) -> None:
    """Write a label table to a ``.npz`` file, atomically.

    Raises:
        ValueError: if the extension is not ``.npz``.
        OSError: if the file cannot be written; a previous file is kept.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"expected a label file with extension .npz, got {str(path)!r}; rename it")
    arrays: dict[str, Any] = {
        "labels": table.labels.numpy(),
        "index": table.origin.numpy(),
        "class_names": np.array(class_names, dtype=np.str_),
        "noise_kind": np.array(noise_kind),
        "noise_rate": np.array(np.nan if noise_rate is None else noise_rate),
        "seed": np.array(seed, dtype=np.uint64),
    }
    if table.true_labels is not None:
        arrays["true_labels"] = table.true_labels.numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
