"""Labels of a training set: subset, noise, validation split. Independent of images and trainer."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanm_lightning.data.instance_noise import Pixels
from sanm_lightning.data.label_rows import FileLabels
from sanm_lightning.data.noise import Noise
from sanm_lightning.random_streams import named_generator
from sanm_lightning.safe_files import atomic_write

__all__ = ["LabelTable", "OtherSamples", "balanced_subset", "label_tables", "save_label_table", "stratified_hold_out"]


Array = np.ndarray[Any, Any]


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


class OtherSamples(NamedTuple):
    """The M samples of the original training set that are not in a split: held out, outside of the subset, or dropped.

    Label files contain the whole original set, hence also these samples.

    Attributes:
        origin: positions in the original set, shape (M,), int64.
        paths: paths relative to the root, shape (M,); None without files.
        labels: given labels, shape (M,), int64.
        dropped: whether the samples are dropped, shape (M,), bool.
    """

    origin: Array
    paths: Array | None
    labels: Array
    dropped: Array

    def arrays(self) -> dict[str, Any]:
        """Return the arrays of a label file, by name."""
        found = {"index": self.origin, "paths": self.paths, "labels": self.labels, "dropped": self.dropped}
        return {f"other_{name}": part for name, part in found.items() if part is not None}


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


def stratified_hold_out(labels: Tensor, size: int, seed: int) -> Tensor:
    """Choose random samples to hold out, with equal fractions of all classes; at least one sample per class is kept.

    Args:
        labels: shape (N,), int64.
        size: number of samples to hold out, 0 to N; fewer are held out if the classes are too small.
        seed: random seed.

    Returns:
        Mask of the held-out samples, shape (N,), bool.
    """
    order = torch.randperm(len(labels), generator=named_generator("split", seed))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    number = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    # Rank sample k of a class of n samples by (k + 1/2) / n; the last sample of each class is never held out.
    turn = (number + 0.5) / counts[labels[by_class]]
    turn[number == counts[labels[by_class]] - 1] = torch.inf
    free = int(turn.isfinite().sum())
    rank = torch.empty_like(turn)
    rank[by_class] = turn
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[rank[order].argsort(stable=True)[: min(size, free)]]] = True  # ties of classes in random order
    return held


def label_tables(
    labels: Tensor,
    num_classes: int,
    seed: int,
    noise: Noise,
    max_train_samples: int | None = None,
    val_fraction: float = 0.0,
    curated: bool = True,
    images: Pixels | None = None,
    file: FileLabels | None = None,
    least: int = 0,
    true_labels: Tensor | None = None,
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
        images: images of the original set, read by instance-dependent noise only.
        file: labels and kept samples from a label file, which replace the noise.
        least: minimum number of held-out samples.
        true_labels: true labels of the original set, shape (N,), int64, if its labels are noisy.

    Returns:
        The tables by split name.

    Raises:
        ValueError: if a split would be empty, or an argument is out of its range.
    """
    if file is None and noise.kind == "file":
        file = noise.read(labels, [str(number) for number in range(num_classes)])
    kept = torch.arange(len(labels)) if file is None else file.kept.nonzero().flatten()
    if max_train_samples is not None:
        kept = kept[balanced_subset(labels[kept], max_train_samples, num_classes, seed)]
    if file is not None:  # a file contains the labels of the whole original set
        given = file.labels[kept]
    else:
        given = noise.apply(labels[kept], num_classes, seed, None if images is None else images.at(kept))
    true = labels[kept] if curated or noise.injects else None
    true = true if true_labels is None else true_labels[kept]
    held_out = max(least, round(val_fraction * len(kept)))
    if val_fraction > 0 and held_out < len(kept):
        held = stratified_hold_out(given, held_out, seed)
        held_out = int(held.sum())
    else:
        held = torch.zeros(len(kept), dtype=torch.bool)
    if val_fraction > 0 and not 0 < held_out < len(kept):
        raise ValueError(
            f"expected a held-out fraction with samples in both splits, got {val_fraction}, which gives {held_out} samples "
            f"for validation and {len(kept) - held_out} for training; choose another val_fraction or holdout_fraction"
        )
    # Sorted: without a subset and a validation split, index i is image i of the data set.
    rows = {"train": (~held).nonzero().flatten()}
    if held_out:
        rows["val"] = held.nonzero().flatten()
    return {name: LabelTable(given[row], None if true is None else true[row], kept[row]) for name, row in rows.items()}


def save_label_table(
    path: str | Path,
    table: LabelTable,
    class_names: list[str],
    noise_kind: str,
    noise_rate: float | None,
    seed: int,
    paths: Sequence[str] | None = None,
    others: OtherSamples | None = None,
) -> None:
    """Write a label table, and the other samples of the original set, to a ``.npz`` file, atomically.

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
    if others is not None:
        arrays |= others.arrays()
    if paths is not None:
        arrays["paths"] = np.array(paths, dtype=np.str_)
    if table.true_labels is not None:
        arrays["true_labels"] = table.true_labels.numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)
