"""Kinds of label noise: callables of labels, a generator and, for instance-dependent noise, images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sanm_lightning.data.instance_noise import PixelScale, instance_dependent
from sanm_lightning.data.label_files import read_labels
from sanm_lightning.data.noise_functions import (
    asymmetric,
    asymmetric_sequential,
    pair_flip,
    symmetric,
    symmetric_exclusive,
)
from sanm_lightning.data.transition_noise import transition

__all__ = [
    "Asymmetric",
    "AsymmetricSequential",
    "FromFile",
    "InstanceDependent",
    "LabelNoise",
    "NoNoise",
    "PairFlip",
    "Symmetric",
    "SymmetricExclusive",
    "Transition",
]


class LabelNoise(Protocol):
    """Label noise: a callable of labels (N,), a generator and optional images that returns new labels (N,)."""

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels, shape (N,), int64; the given ones are not modified."""
        ...


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
class Transition:
    """Noise of :func:`transition`, with a matrix (C, C)."""

    matrix: Tensor

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return transition(labels, self.matrix, generator)


@dataclass(frozen=True)
class InstanceDependent:
    """Noise of :func:`instance_dependent`, which needs images."""

    rate: float
    num_classes: int
    pixels: PixelScale = "raw"

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels.

        Raises:
            ValueError: if there are no images.
        """
        if images is None:
            raise ValueError(
                "expected images for instance-dependent noise, got labels only; pass images, or use it in a data module"
            )
        return instance_dependent(labels, self.rate, self.num_classes, generator, images, self.pixels)


@dataclass(frozen=True)
class FromFile:
    """Labels of :func:`read_labels`, which replace the given labels."""

    path: str
    num_classes: int
    key: str | None = None

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return the labels of the file."""
        return read_labels(self.path, len(labels), self.num_classes, self.key).to(labels.device)
