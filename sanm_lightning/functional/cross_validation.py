"""Noise rates from the accuracy of cross-validation on noisy labels."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CrossValidated",
    "cross_validated",
    "cross_validated_noise_rate",
    "discarded_fraction",
    "held_out",
    "largest_losses",
    "random_halves",
    "remaining_noise_rate",
]


def random_halves(candidate: Tensor, generator: torch.Generator) -> Tensor:
    """Divide candidates (N,) bool at random: (N,) int64, 0 or 1, the first half being the smaller one; -1 for the others."""
    order = torch.randperm(len(candidate), generator=generator).to(candidate.device)
    order = order[candidate[order]]
    half = torch.full_like(candidate, -1, dtype=torch.int64)
    half[order] = (torch.arange(len(order), device=order.device) >= len(order) // 2).long()
    return half


def held_out(values: Tensor, half: Tensor) -> Tensor:
    """Return for each sample the value of the network that was not trained on its half.

    Args:
        values: values of networks 0 and 1, which were trained on half 0 and 1, shape (2, N).
        half: half of each sample, shape (N,), 0 or 1; -1, for samples that are in neither, takes the value of network 1.

    Returns:
        Shape (N,).
    """
    return torch.where(half == 1, values[0], values[1])


class CrossValidated(NamedTuple):
    """Outcome of a twofold cross-validation for each sample."""

    agreed: Tensor
    """(N,) bool: whether the held-out prediction of a candidate is its label."""
    losses: Tensor
    """(N,): held-out losses."""
    accuracy: float
    """Fraction of the candidates that agree, in [0, 1]; 0 without candidates."""


def cross_validated(predictions: Tensor, losses: Tensor, labels: Tensor, half: Tensor) -> CrossValidated:
    """Compare the label of each candidate with the prediction of the network that was not trained on its half.

    Source: Chen et al., ICML 2019, Algorithm 1.

    Args:
        predictions: predicted classes of networks 0 and 1, which were trained on half 0 and 1, shape (2, N), int64.
        losses: losses of the labels under the networks, shape (2, N).
        labels: given labels, shape (N,).
        half: half of each candidate, shape (N,), 0 or 1; -1 for other samples.
    """
    agreed = (half >= 0) & (held_out(predictions, half) == labels)
    accuracy = float(agreed.sum() / (half >= 0).sum().clamp(min=1))
    return CrossValidated(agreed, held_out(losses, half), accuracy)


def largest_losses(losses: Tensor, agreed: Tensor, half: Tensor, fraction: float) -> Tensor:
    """Select the samples of each half with the largest losses, ``fraction`` times the number of its agreeing samples.

    Source: the code of Chen et al., ICML 2019, whose agreeing samples are never discarded.

    Args:
        losses: held-out losses, shape (N,).
        agreed: whether the held-out prediction is the label, shape (N,), bool.
        half: half of each sample, shape (N,), 0 or 1, or -1 for samples that are not considered.
        fraction: >= 0, see :func:`discarded_fraction`.

    Returns:
        Shape (N,), bool.
    """
    largest = torch.zeros_like(agreed)
    for side in (0, 1):
        members = half == side
        count = min(int(fraction * int((agreed & members).sum())), int(members.sum()))
        largest[losses.masked_fill(~members, float("-inf")).argsort(descending=True)[:count]] = True
    return largest & ~agreed


def cross_validated_noise_rate(accuracy: float, num_classes: int) -> float:
    """Return the rate of symmetric noise at which a network trained on such labels has an accuracy on such labels.

    Source: Chen et al., ICML 2019, Proposition 1: accuracy (1 - rate)^2 + rate^2 / (C - 1), solved for the rate.

    Args:
        accuracy: accuracy on held-out noisy labels, in [0, 1].
        num_classes: C, number of classes.

    Returns:
        In [0, (C - 1) / C], where labels are random; also for accuracies below 1 / C.
    """
    a = 1 + 1 / (num_classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - a * (1 - accuracy)))) / a


def discarded_fraction(noise_rate: float) -> float:
    """Return the number of discarded per selected samples: noise rate / (1 - noise rate), at most 2."""
    return min(2.0, noise_rate / max(1 - noise_rate, 1e-12))


def remaining_noise_rate(noise_rate: float, alternatives: int) -> float:
    """Return the noise rate among samples whose held-out prediction agrees with their label.

    Source: Chen et al., ICML 2019, Proposition 1: rate^2 / (rate^2 + alternatives (1 - rate)^2).

    Args:
        noise_rate: in [0, 1].
        alternatives: number of wrong classes that a label may have: C - 1 for symmetric noise, 1 for pairs of classes.
    """
    return noise_rate**2 / (noise_rate**2 + alternatives * (1 - noise_rate) ** 2)
