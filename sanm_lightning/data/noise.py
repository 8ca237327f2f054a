"""Label noise: what is done to the labels of a training set, from a seed or from a file.

Every function takes labels of shape (N,), int64, and returns a new tensor of the same shape; the input is never written
to. All of them choose **exactly** ``round(rate * N)`` samples, so that a rate is met and not only expected. Which
published methods use which kind is not uniform, and the two symmetric kinds differ by a factor (C - 1) / C in the share
of labels that are wrong: say which one a number belongs to.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from sanm_lightning.data.label_files import read_labels
from sanm_lightning.data.label_rows import FileLabels, read_label_file
from sanm_lightning.random_streams import named_generator

__all__ = [
    "CIFAR10_MAP",
    "CIFAR100_SUPERCLASSES",
    "Noise",
    "asymmetric",
    "cifar100_superclass_map",
    "class_map",
    "pair_flip",
    "read_labels",
    "symmetric",
    "symmetric_exclusive",
]

NoiseKind = Literal["none", "symmetric", "symmetric_exclusive", "asymmetric", "pair", "file"]

# truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse (Patrini et al., CVPR 2017).
CIFAR10_MAP: dict[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}

# Fine classes of each super-class (Krizhevsky, 2009). Fine ids are the alphabetical ranks of these names, so the
# classes of one super-class are NOT five consecutive ids.
CIFAR100_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


def cifar100_superclass_map() -> dict[int, int]:
    """Next class inside the true super-class of CIFAR-100, members ordered by fine id, the last to the first.

    Returns:
        A map of all 100 fine ids to another fine id of the same super-class.
    """
    fine_id = {name: i for i, name in enumerate(sorted(n for names in CIFAR100_SUPERCLASSES.values() for n in names))}
    mapping: dict[int, int] = {}
    for names in CIFAR100_SUPERCLASSES.values():
        members = sorted(fine_id[name] for name in names)
        mapping.update(zip(members, members[1:] + members[:1], strict=True))
    return mapping


_MAPS: dict[str, Callable[[], dict[int, int]]] = {
    "cifar10": lambda: dict(CIFAR10_MAP),
    "cifar100_superclass": cifar100_superclass_map,
}


def class_map(name: str) -> dict[int, int]:
    """The class-to-class map of a name: ``cifar10`` or ``cifar100_superclass``.

    Raises:
        ValueError: no map has this name.
    """
    if name not in _MAPS:
        raise ValueError(f"The noise mapping {name!r} is unknown: choose one of {sorted(_MAPS)}, or give a map of ids.")
    return _MAPS[name]()


def symmetric(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Symmetric noise that **may keep** the label: a uniform draw over all C classes for ``round(rate * N)`` samples.

    The definition of DivideMix (Li et al., ICLR 2020) and of the methods that follow it. The share of wrong labels is
    about ``rate * (C - 1) / C``, less than asked.

    Args:
        labels: shape (N,), int64, in [0, C).
        rate: share of samples that are drawn anew, in [0, 1].
        num_classes: C.
        generator: source of all randomness.

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: labels or rate are not as described.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    drawn = torch.randint(num_classes, (len(chosen),), generator=generator, device=generator.device)
    return _replaced(labels, chosen, drawn.to(labels.device))


def symmetric_exclusive(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Symmetric noise that **always flips**: a uniform draw over the other C - 1 classes, ``round(rate * N)`` times.

    The definition of Co-teaching (Han et al., NeurIPS 2018). The share of wrong labels is the rate that was asked for.
    Arguments, result and errors as for `symmetric`; a single class cannot be flipped and raises ValueError.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    if num_classes < 2:
        raise ValueError(f"A label can flip to another class only with 2 or more classes, got {num_classes}: use more.")
    step = torch.randint(1, num_classes, (len(chosen),), generator=generator, device=generator.device)
    return _replaced(labels, chosen, (labels[chosen] + step.to(labels.device)) % num_classes)


def asymmetric(
    labels: Tensor, rate: float, num_classes: int, generator: torch.Generator, mapping: Mapping[int, int]
) -> Tensor:
    """Asymmetric noise: ``round(rate * N)`` samples of **all** classes are sent through a class-to-class map.

    Classes that are not in the map keep their label, so the share of wrong labels is the rate times the share of mapped
    classes (half the rate for balanced CIFAR-10). All labels are read before any is written: a cat that became a dog is
    not a candidate for the way back. Class by class in place, as in some released code, would be another noise.

    Args:
        labels: shape (N,), int64, in [0, C).
        rate: share of samples that are sent through the map, in [0, 1].
        num_classes: C.
        generator: source of all randomness.
        mapping: from class to class, both in [0, C).

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: labels, rate or map are not as described.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    outside = sorted(c for c in {*mapping.keys(), *mapping.values()} if not 0 <= c < num_classes)
    if outside:
        raise ValueError(
            f"The noise mapping names classes {outside[:5]}, but there are only {num_classes} classes (0 to "
            f"{num_classes - 1}): choose a mapping for this data set."
        )
    table = torch.arange(num_classes, device=labels.device)
    table[list(mapping.keys())] = torch.tensor(list(mapping.values()), dtype=torch.int64, device=labels.device)
    return _replaced(labels, chosen, table[labels[chosen]])


def pair_flip(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Pair noise: ``round(rate * N)`` samples move from class i to class (i + 1) mod C (Han et al., NeurIPS 2018).

    Arguments, result and errors as for `symmetric_exclusive`; the share of wrong labels is the rate.
    """
    chosen = _choose(labels, rate, num_classes, generator)
    if num_classes < 2:
        raise ValueError(
            f"A label can flip to the next class only with 2 or more of them, got {num_classes}: use more."
        )
    return _replaced(labels, chosen, (labels[chosen] + 1) % num_classes)


def _choose(labels: Tensor, rate: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Indices of exactly ``round(rate * N)`` random samples, after a check of the arguments."""
    _check_labels(labels, num_classes, "labels")
    _check_rate(rate)
    order = torch.randperm(len(labels), generator=generator, device=generator.device)
    return order[: round(rate * len(labels))].to(labels.device)


def _replaced(labels: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    noisy = labels.clone()
    noisy[chosen] = values
    return noisy


def _check_rate(rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"The noise rate must be a share in [0, 1], got {rate!r}: write 0.5 for half of the samples.")


def _check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(
            f"The {what} must be a tensor of shape (N,) and type int64, got shape {tuple(labels.shape)} and type "
            f"{labels.dtype}: give one class index per sample."
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"The {what} must lie in 0 to {num_classes - 1}, got values from {int(labels.min())} to "
            f"{int(labels.max())}: number the classes from 0 and check the number of classes."
        )


@dataclass(frozen=True)
class Noise:
    """What is done to the training labels. By default nothing.

    Args:
        kind: ``none``; ``symmetric`` (uniform over all classes, may keep the label); ``symmetric_exclusive`` (always
            another class); ``asymmetric`` (through a class map); ``pair`` (to the next class); ``file`` (labels read
            from a file that covers the whole original training set).
        rate: share of the training samples that is treated, in [0, 1]; not used by ``none`` and ``file``.
        mapping: for ``asymmetric``: ``cifar10``, ``cifar100_superclass`` or a map from class index to class index.
        path: for ``file``: a ``.npy``, ``.npz`` or ``.csv`` file, see `read_label_file` and `read_labels`.
        key: for ``file``: name of the array or column, where there are several.
        seed: seed of the noise alone; by default the seed of the data module.

    Raises:
        ValueError: a part is missing, unknown or out of range.
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
            raise ValueError(f"The noise kind {self.kind!r} is unknown: choose one of {list(kinds)}.")
        _check_rate(self.rate)
        if self.kind in ("none", "file") and self.rate:
            raise ValueError(
                f"Noise of kind {self.kind!r} has no rate, got {self.rate}: leave the rate out, or choose a kind that "
                "has one, such as 'symmetric'."
            )
        if self.kind == "asymmetric" and not self.mapping:
            raise ValueError(
                f"Noise of kind 'asymmetric' needs a mapping, got {self.mapping!r}: give one of {sorted(_MAPS)} or a "
                "map of class ids."
            )
        if self.kind == "file" and not self.path:
            raise ValueError(f"Noise of kind 'file' needs the path of a label file, got {self.path!r}: give a path.")
        if isinstance(self.mapping, str):
            class_map(self.mapping)
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"The seed of the noise must be 0 or more, got {self.seed}: choose another, such as 0.")

    def build(self, num_classes: int) -> "LabelNoise":
        """Return the noise of this kind for C classes, as a callable (labels, generator, images=None) -> labels.

        Args:
            num_classes: C.
        """
        match self.kind:
            case "symmetric":
                return Symmetric(self.rate, num_classes)
            case "symmetric_exclusive":
                return SymmetricExclusive(self.rate, num_classes)
            case "asymmetric":
                mapping = class_map(self.mapping) if isinstance(self.mapping, str) else self.mapping
                return Asymmetric(self.rate, num_classes, mapping or {})
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
        """Return the labels of the file, and which samples it keeps; None where the noise is of another kind.

        Arguments and errors as for :func:`~sanm_lightning.data.label_rows.read_label_file`.
        """
        if self.kind != "file" or self.path is None:
            return None
        return read_label_file(self.path, labels, class_names, paths, other_paths, self.key)

    def apply(self, labels: Tensor, num_classes: int, seed: int, images: Any = None) -> Tensor:
        """Return noisy labels: the same for the same labels, noise and seed, on every machine and process.

        Args:
            labels: shape (N,), int64, in [0, C).
            num_classes: C.
            seed: used where the noise has no seed of its own.
            images: of the samples, or a callable that gives them, for noise that depends on them.

        Returns:
            A new tensor, shape (N,), int64.

        Raises:
            ValueError, FileNotFoundError: as the function of this kind.
        """
        _check_labels(labels, num_classes, "labels")
        generator = named_generator("noise", seed if self.seed is None else self.seed)
        return self.build(num_classes)(labels, generator, images)


class LabelNoise(Protocol):
    """A kind of noise: given labels (N,), a generator and, if need be, images, it returns new labels (N,)."""

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor: ...


@dataclass(frozen=True)
class NoNoise:
    """Labels as they are."""

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
    """Noise of :func:`asymmetric`, through a map from class to class."""

    rate: float
    num_classes: int
    mapping: Mapping[int, int]

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return noisy labels."""
        return asymmetric(labels, self.rate, self.num_classes, generator, self.mapping)


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
    """Labels of :func:`read_labels`, in place of the given ones."""

    path: str
    num_classes: int
    key: str | None = None

    def __call__(self, labels: Tensor, generator: torch.Generator, images: Any = None) -> Tensor:
        """Return the labels in the file."""
        return read_labels(self.path, len(labels), self.num_classes, self.key).to(labels.device)
