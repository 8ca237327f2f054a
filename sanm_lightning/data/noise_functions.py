"""Label noise as functions of labels and a generator.

Every function takes labels of shape (N,), int64, and returns a new tensor of the same shape; the input is not modified.
All functions select **exactly** ``round(rate * N)`` samples, so the rate is exact and not an expectation.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = [
    "asymmetric",
    "asymmetric_sequential",
    "check_labels",
    "check_rate",
    "pair_flip",
    "symmetric",
    "symmetric_exclusive",
]


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
    check_labels(labels, num_classes, "labels")
    check_rate(rate)
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
    check_labels(labels, num_classes, "labels")
    check_rate(rate)
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


def check_rate(rate: float) -> None:
    """Raise ValueError unless the rate is a number in [0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ValueError(f"expected a noise rate in [0, 1], got {rate!r}; use 0.5 for half of the samples")


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Raise ValueError unless the labels are (N,), int64, in [0, C)."""
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
