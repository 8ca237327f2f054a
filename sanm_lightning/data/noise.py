"""Label noise for training sets, generated from a seed or read from a file.

Every function takes labels of shape (N,), int64, and returns a new tensor of the same shape; the input is not modified.
All functions select **exactly** ``round(rate * N)`` samples, so the rate is exact and not an expectation. Published
methods use different kinds, and the two symmetric kinds differ by a factor (C - 1) / C in the fraction of wrong labels:
report the kind together with the rate. Released codes that truncate ``rate * N``, or sample every label independently
(Co-teaching, CDR, ELR on CIFAR-100), have other counts, by one sample or by the spread of a binomial distribution.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from sanm_lightning.data.instance_noise import PixelScale
from sanm_lightning.data.label_files import read_labels
from sanm_lightning.data.label_rows import FileLabels, read_label_file
from sanm_lightning.data.noise_functions import (
    asymmetric,
    asymmetric_sequential,
    check_labels,
    check_rate,
    pair_flip,
    symmetric,
    symmetric_exclusive,
)
from sanm_lightning.data.noise_kinds import (
    Asymmetric,
    AsymmetricSequential,
    FromFile,
    InstanceDependent,
    LabelNoise,
    NoNoise,
    PairFlip,
    Symmetric,
    SymmetricExclusive,
    Transition,
)
from sanm_lightning.data.noise_maps import (
    CIFAR10_MAP,
    CIFAR100_SUPERCLASSES,
    MAPS,
    cifar100_blocks_of_five_map,
    cifar100_superclass_map,
    class_map,
)
from sanm_lightning.data.transition_noise import read_matrix, transition
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
    "transition",
]

NoiseKind = Literal[
    "none", "symmetric", "symmetric_exclusive", "asymmetric", "asymmetric_sequential", "pair", "transition", "instance",
    "file",
]  # fmt: skip
WITHOUT_RATE = ("none", "transition", "file")


@dataclass(frozen=True)
class Noise:
    """Noise of the training labels. Default: none.

    Args:
        kind: ``none``; ``symmetric`` (uniform over all classes, may keep the label); ``symmetric_exclusive`` (always
            another class); ``asymmetric`` (class map); ``asymmetric_sequential``
            (class map, class by class in place); ``pair`` (next class); ``transition`` (transition matrix);
            ``instance`` (the image determines the wrong label); ``file`` (labels read from a file for the whole original
            training set).
        rate: fraction of the training samples that is selected, in [0, 1]; for ``instance``, the mean flip rate; not used
            by ``none``, ``transition`` and ``file``.
        mapping: for both asymmetric kinds: ``cifar10``, ``cifar100_superclass``, ``cifar100_blocks_of_five``, or a map from
            class index to class index.
        path: for ``file``: a ``.npy``, ``.npz``, ``.csv``, ``.json`` or ``.pt`` file, see `read_label_file` and
            `read_labels`.
        key: for ``file``: name of the array or column, if there are several.
        matrix: for ``transition``: C rows of C probabilities, row i for class i; or a ``.npy`` or ``.csv`` file of them.
        pixels: for ``instance``: scale of the pixel values, ``raw`` (0 to 255, as in the code of the source) or
            ``normalized`` (by mean and std of the data).
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
    matrix: list[list[float]] | str | None = None
    pixels: PixelScale = "raw"

    def __post_init__(self) -> None:
        kinds = get_args(NoiseKind)
        if self.kind not in kinds:
            raise ValueError(f"expected a noise kind among {list(kinds)}, got {self.kind!r}; choose one of them")
        check_rate(self.rate)
        if self.kind in WITHOUT_RATE and self.rate:
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
        if (self.kind == "transition") != (self.matrix is not None):
            got = "none" if self.matrix is None else f"one for kind {self.kind!r}"
            raise ValueError(
                f"expected a transition matrix for noise of kind 'transition' and for no other, got {got}; set noise.matrix "
                "together with noise.kind transition"
            )
        if self.pixels not in get_args(PixelScale):
            raise ValueError(f"expected pixels 'raw' or 'normalized', got {self.pixels!r}; choose one of them")
        if isinstance(self.mapping, str):
            class_map(self.mapping)
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"expected a noise seed of 0 or more, got {self.seed}; choose another, such as 0")

    def build(self, num_classes: int) -> LabelNoise:
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
            case "transition":
                return Transition(read_matrix(self.matrix or "", num_classes))
            case "instance":
                return InstanceDependent(self.rate, num_classes, self.pixels)
            case "file":
                return FromFile(str(self.path), num_classes, self.key)
        return NoNoise()

    @property
    def injects(self) -> bool:
        """Whether the noise changes the given labels, so that these are the true labels."""
        return self.kind not in ("none", "file")

    @property
    def asked_rate(self) -> float | None:
        """Requested rate, in [0, 1]; None for kinds without one."""
        return None if self.kind in WITHOUT_RATE else self.rate

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
            images: images of the samples for instance-dependent noise: ``Pixels``, or a tensor (N, 3, H, W), uint8.

        Returns:
            Noisy labels, shape (N,), int64.

        Raises:
            ValueError: if labels, rate, mapping or file are invalid.
            FileNotFoundError: if the label file does not exist.
        """
        check_labels(labels, num_classes, "labels")
        generator = named_generator("noise", seed if self.seed is None else self.seed)
        return self.build(num_classes)(labels, generator, images)
