"""Label noise for training sets, generated from a seed or read from a file.

Every function takes labels of shape (N,), int64, and returns a new tensor of the same shape; the input is not modified.
All functions select **exactly** ``round(rate * N)`` samples, so the rate is exact and not an expectation. Published
methods use different kinds, and the two symmetric kinds differ by a factor (C - 1) / C in the fraction of wrong labels:
report the kind together with the rate. Released codes that truncate ``rate * N``, or sample every label independently
(Co-teaching, CDR, ELR on CIFAR-100), have other counts, by one sample or by the spread of a binomial distribution.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from sanm_lightning.data.label_files import read_labels
from sanm_lightning.data.label_rows import FileLabels, read_label_file
from sanm_lightning.data.noise_maps import (
    CIFAR10_MAP,
    CIFAR100_SUPERCLASSES,
    MAPS,
    cifar100_blocks_of_five_map,
    cifar100_superclass_map,
    class_map,
)
from sanm_lightning.random_streams import named_generator

__all__ = [
    "CIFAR10_MAP",
    "CIFAR100_SUPERCLASSES",
    "Noise",
    "asymmetric",
    "asymmetric_sequential",
    "cifar100_blocks_of_five_map",
    "cifar100_superclass_map",
    "class_map",
    "pair_flip",
    "read_labels",
    "symmetric",
    "symmetric_exclusive",
]

NoiseKind = Literal["none", "symmetric", "symmetric_exclusive", "asymmetric", "asymmetric_sequential", "pair", "file"]


def symmetric(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Apply symmetric noise that **may keep** the label: ``round(rate * N)`` labels are sampled from all C classes.

    This is the definition of DivideMix (Li et al., ICLR 2020) and the methods based on it. The fraction of wrong labels
    is about ``rate * (C - 1) / C``, lower than the requested rate.

    Args:
        labels: shape (N,), int64, in [0, C).
        rate: fraction of samples with a resampled label, in [0, 1].
        num_classes: C.
        generator: random generator.

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: if labels or rate are invalid.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    drawn = torch.randint(num_classes, (len(chosen),), generator=generator, device=generator.device)
    return _replaced(labels, chosen, drawn.to(labels.device))


def symmetric_exclusive(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Apply symmetric noise that **always flips**: ``round(rate * N)`` labels are sampled from the other C - 1 classes.

    This is the definition of Co-teaching (Han et al., NeurIPS 2018). The fraction of wrong labels is the requested
    rate. Arguments, return value and errors as for `symmetric`; fewer than two classes raise ValueError.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    if num_classes < 2:
        raise ValueError(f"expected 2 or more classes for noise that flips labels, got {num_classes}; use other noise")
    step = torch.randint(1, num_classes, (len(chosen),), generator=generator, device=generator.device)
    return _replaced(labels, chosen, (labels[chosen] + step.to(labels.device)) % num_classes)


def asymmetric(
    labels: Tensor, rate: float, num_classes: int, generator: torch.Generator, mapping: Mapping[int, int]
) -> Tensor:
    """Apply asymmetric noise: a class-to-class map is applied to ``round(rate * N)`` samples of **all** classes.

    Classes that are not in the map keep their label, so the fraction of wrong labels is the rate times the fraction of
    samples in mapped classes (half the rate for balanced CIFAR-10). The map is applied to the original labels: a cat
    relabeled as dog is not mapped back. Some released code maps class by class in place, which gives different noise.

    Args:
        labels: shape (N,), int64, in [0, C).
        rate: fraction of samples that the map is applied to, in [0, 1].
        num_classes: C.
        generator: random generator.
        mapping: map from class to class, both in [0, C).

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: if labels, rate or map are invalid.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    _check_mapping(mapping, num_classes)
    table = torch.arange(num_classes, device=labels.device)
    table[list(mapping.keys())] = torch.tensor(list(mapping.values()), dtype=torch.int64, device=labels.device)
    return _replaced(labels, chosen, table[labels[chosen]])


def asymmetric_sequential(
    labels: Tensor, rate: float, num_classes: int, generator: torch.Generator, mapping: Mapping[int, int]
) -> Tensor:
    """Apply a class-to-class map **class by class, in place**: relabeled samples count for classes with a larger id.

    Source: the released codes of ELR and CDR for CIFAR-10. At rate .4, 24 % of the cats remain labeled as dogs, because a
    part of the cats that were relabeled as dogs is relabeled as cats again; 40 % of the dogs are labeled as cats.
    Arguments, return value and errors as for `asymmetric`; ``ceil(rate * n)`` of the n samples that have the label of a
    class at its turn are relabeled.
    """
    _check_labels(labels, num_classes, "labels")
    _check_rate(rate)
    _check_mapping(mapping, num_classes)
    noisy = labels.clone()
    for label in range(num_classes):
        if label in mapping:
            members = (noisy == label).nonzero()[:, 0]
            order = torch.randperm(len(members), generator=generator, device=generator.device).to(labels.device)
            noisy[members[order[: math.ceil(rate * len(members))]]] = mapping[label]
    return noisy


def pair_flip(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Apply pair noise: ``round(rate * N)`` labels change from i to (i + 1) mod C (Han et al., NeurIPS 2018).

    Arguments, return value and errors as for `symmetric_exclusive`; the fraction of wrong labels is the rate.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    if num_classes < 2:
        raise ValueError(f"expected 2 or more classes for noise that flips labels, got {num_classes}; use other noise")
    return _replaced(labels, chosen, (labels[chosen] + 1) % num_classes)


def _choose(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Return the indices of exactly ``round(rate * N)`` random samples, after a check of the arguments."""
    _check_labels(labels, num_classes, "labels")
    _check_rate(rate)
    order = torch.randperm(len(labels), generator=generator, device=generator.device)
    return order[: round(rate * len(labels))].to(labels.device)


def _replaced(labels: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    noisy = labels.clone()
    noisy[chosen] = values
    return noisy


def _check_mapping(mapping: Mapping[int, int], num_classes: int) -> None:
    outside = sorted(c for c in {*mapping.keys(), *mapping.values()} if not 0 <= c < num_classes)
    if outside:
        raise ValueError(
            f"expected a noise mapping of classes in 0 to {num_classes - 1}, got classes {outside[:5]}; choose a "
            "mapping for this data set"
        )


def _check_rate(rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"expected a noise rate in [0, 1], got {rate!r}; use 0.5 for half of the samples")


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"expected {what} of shape (N,) and type int64, got shape {tuple(labels.shape)} and type {labels.dtype}; "
            "use one class index per sample"
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"expected {what} in 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}; number the "
            "classes from 0 and check the number of classes"
        )


@dataclass(frozen=True)
class Noise:
    """Noise of the training labels. Default: none.

    Args:
        kind: ``none``; ``symmetric`` (uniform over all classes, may keep the label); ``symmetric_exclusive`` (always
            another class); ``asymmetric`` (class map); ``asymmetric_sequential``
            (class map, class by class in place); ``pair`` (next class); ``file`` (labels read from a file for the
            whole original training set).
        rate: fraction of the training samples that is selected, in [0, 1]; not used by ``none`` and ``file``.
        mapping: for both asymmetric kinds: ``cifar10``, ``cifar100_superclass``, ``cifar100_blocks_of_five``, or a map from
            class index to class index.
        path: for ``file``: a ``.npy``, ``.npz`` or ``.csv`` file, see `read_label_file` and `read_labels`.
        key: for ``file``: name of the array or column, if there are several.
        seed: seed of the noise; default: the seed of the data module.

    Raises:
        ValueError: if an argument is missing, unknown or out of range.
    """

    kind: NoiseKind = "none"
    rate: float = 0.0
    mapping: dict[int, int] | str | None = None
    path: str | None = None
    key: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        kinds = get_args(NoiseKind)
        if self.kind not in kinds:
            raise ValueError(f"expected a noise kind among {list(kinds)}, got {self.kind!r}; choose one of them")
        _check_rate(self.rate)
        if self.kind in ("none", "file") and self.rate:
            raise ValueError(
                f"expected no rate for noise of kind {self.kind!r}, got {self.rate}; omit the rate, or choose a kind "
                "with a rate, such as 'symmetric'"
            )
        if self.kind.startswith("asymmetric") and not self.mapping:
            raise ValueError(
                f"expected a mapping for noise of kind {self.kind!r}, got {self.mapping!r}; choose one of "
                f"{sorted(MAPS)}, or use a map of class ids"
            )
        if self.kind == "file" and not self.path:
            raise ValueError(
                f"expected the path of a label file for noise of kind 'file', got {self.path!r}; set noise.path"
            )
        if isinstance(self.mapping, str):
            class_map(self.mapping)
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"expected a noise seed of 0 or more, got {self.seed}; choose another, such as 0")

    def build(self, num_classes: int) -> "LabelNoise":
        """Create the noise of this kind for C classes, as a callable (labels, generator, images=None) -> labels.

        Args:
            num_classes: C, number of classes.
        """
        match self.kind:
            case "symmetric":
                return Symmetric(self.rate, num_classes)
            case "symmetric_exclusive":
                return SymmetricExclusive(self.rate, num_classes)
            case "asymmetric" | "asymmetric_sequential":
                mapping = class_map(self.mapping) if isinstance(self.mapping, str) else self.mapping
                kind = Asymmetric if self.kind == "asymmetric" else AsymmetricSequential
                return kind(self.rate, num_classes, mapping or {})
            case "pair":
                return PairFlip(self.rate, num_classes)
            case "file":
                return FromFile(str(self.path), num_classes, self.key)
        return NoNoise()

    def read(
        self,
        labels: Tensor,
        class_names: Sequence[str],
        paths: Sequence[str] | None = None,
        other_paths: Collection[str] = (),
    ) -> FileLabels | None:
        """Read the labels and the kept samples from the file; return None for other kinds of noise.

        For arguments and errors see :func:`~sanm_lightning.data.label_rows.read_label_file`.
        """
        if self.kind != "file" or self.path is None:
            return None
        return read_label_file(self.path, labels, class_names, paths, other_paths, self.key)

    def apply(self, labels: Tensor, num_classes: int, seed: int, images: Any = None) -> Tensor:
        """Apply the noise; the result is deterministic for given labels, noise and seed.

        Args:
            labels: shape (N,), int64, in [0, C).
            num_classes: C, number of classes.
            seed: seed to use if the noise has no ``seed``.
            images: images of the samples, or a callable that returns them, for instance-dependent noise.

        Returns:
            Noisy labels, shape (N,), int64.

        Raises:
            ValueError: if labels, rate, mapping or file are invalid.
            FileNotFoundError: if the label file does not exist.
        """
        _check_labels(labels, num_classes, "labels")
        generator = named_generator("noise", seed if self.seed is None else self.seed)
        return self.build(num_classes)(labels, generator, images)


class LabelNoise(Protocol):
    """Label noise: a callable of labels (N,), a generator and optional images that returns new labels (N,)."""

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class NoNoise:
    """No noise: labels are unchanged."""

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return a copy of the labels."""
        return labels.clone()


@dataclass(frozen=True)
class Symmetric:
    """Noise of :func:`symmetric`, which may keep the label."""

    rate: float
    num_classes: int

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return symmetric(labels, self.rate, self.num_classes, generator)


@dataclass(frozen=True)
class SymmetricExclusive:
    """Noise of :func:`symmetric_exclusive`, which always changes the label."""

    rate: float
    num_classes: int

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return symmetric_exclusive(labels, self.rate, self.num_classes, generator)


@dataclass(frozen=True)
class Asymmetric:
    """Noise of :func:`asymmetric`, with a map from class to class."""

    rate: float
    num_classes: int
    mapping: Mapping[int, int]

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return asymmetric(labels, self.rate, self.num_classes, generator, self.mapping)


@dataclass(frozen=True)
class AsymmetricSequential(Asymmetric):
    """Noise of :func:`asymmetric_sequential`, with a map from class to class that is applied class by class."""

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return asymmetric_sequential(labels, self.rate, self.num_classes, generator, self.mapping)


@dataclass(frozen=True)
class PairFlip:
    """Noise of :func:`pair_flip`, to the next class."""

    rate: float
    num_classes: int

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return pair_flip(labels, self.rate, self.num_classes, generator)


@dataclass(frozen=True)
class FromFile:
    """Labels of :func:`read_labels`, which replace the given labels."""

    path: str
    num_classes: int
    key: str | None = None

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return the labels of the file."""
        return read_labels(self.path, len(labels), self.num_classes, self.key).to(labels.device)
