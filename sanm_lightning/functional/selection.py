"""Selection of training samples and of critical weights."""

import math

import torch
from torch import Tensor

__all__ = [
    "class_balanced_draw",
    "class_sets",
    "consistent_votes",
    "critical_threshold",
    "members_by_class",
    "relabel",
    "repeated_draw",
    "small_loss",
    "small_loss_among",
    "threshold_split",
    "uncertainty_weights",
]


def small_loss(losses: Tensor, fraction: float) -> Tensor:
    """Select the int(fraction B) samples of smallest loss, at least one: losses (B,) -> (B,) bool."""
    kept = max(1, int(fraction * len(losses) + 1e-6))  # .3 * 10 is 2.9999... in floating point
    chosen = losses.topk(kept, largest=False, sorted=False).indices
    return torch.zeros_like(losses, dtype=torch.bool).index_fill_(0, chosen, True)


def small_loss_among(losses: Tensor, fraction: float, candidates: Tensor) -> Tensor:
    """Select the int(fraction n) samples of smallest loss among the n candidates, at least one if there are any.

    Args:
        losses: shape (B,).
        fraction: in [0, 1].
        candidates: shape (B,), bool.

    Returns:
        Shape (B,), bool; the candidates are counted on the device, without synchronization.
    """
    count = candidates.sum()
    kept = torch.minimum(count, (fraction * count + 1e-6).long().clamp(min=1))
    order = torch.where(candidates, losses.double(), torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (rank < kept) & candidates


def consistent_votes(votes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most frequent class of each sample, and the normalized entropy of its votes.

    Source: SELFIE (Song et al., ICML 2019), Eq. 2 to 4.

    Args:
        votes: count of each class among the last predictions, shape (B, C).

    Returns:
        Classes (B,), int64; entropies (B,), in [0, 1], 0 if all predictions agree, 1 without predictions.
    """
    total = votes.sum(1, keepdim=True)
    share = votes / total.clamp(min=1)
    uncertainty = -(share * share.clamp(min=1e-12).log()).sum(1) / math.log(votes.shape[1])
    return votes.argmax(1), torch.where(total[:, 0] > 0, uncertainty.clamp(0, 1), 1.0)


def uncertainty_weights(variance: Tensor, count: Tensor, smoothing: float) -> Tensor:
    """Return weights of samples by the variance of the probability of their labels, with mean 1.

    Source: Chang et al., NeurIPS 2017, Eq. 3: the square root of var + var^2 / (n - 1), plus ``smoothing``. Variances of
    fewer than two values count as 0.

    Args:
        variance: variance over the recorded values of each sample, shape (B,), >= 0.
        count: number of recorded values, n, shape (B,).
        smoothing: smallest weight before the normalization, positive.

    Returns:
        Shape (B,), float32, positive, mean 1.
    """
    known = count > 1
    spread = (variance + variance.square() / (count - 1).clamp(min=1)).sqrt()
    weights = torch.where(known, spread, 0.0) + smoothing
    return weights / weights.mean()


def threshold_split(quality: Tensor, threshold: float, clip: bool = False) -> tuple[Tensor, bool]:
    """Divide the samples into a labeled and an unlabeled set, both non-empty.

    Args:
        quality: probability that each label is correct, shape (N,), N >= 2.
        threshold: samples above it are labeled (DivideMix, Section 3.1).
        clip: whether to clip the threshold to the range of ``quality``, as C2D does.

    Returns:
        Whether each sample is labeled, shape (N,), bool; and whether a set was empty with the given threshold. In that
        case, the threshold is clipped to the range; if all probabilities are equal, the first half of the samples is
        labeled.
    """
    labelled = quality > threshold
    empty = bool(labelled.all()) or not bool(labelled.any())
    if clip or empty:
        low, high = float(quality.min()) + 1e-5, float(quality.max()) - 1e-5
        labelled = quality > max(min(threshold, high), low)
    if bool(labelled.all()) or not bool(labelled.any()):
        order = quality.argsort(descending=True, stable=True)
        labelled = torch.zeros_like(labelled)
        labelled[order[: max(1, len(quality) // 2)]] = True
    return labelled, empty


def repeated_draw(pool: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Sample ``length`` elements from repeated random permutations of ``pool`` (n,): (length,)."""
    rounds = max(1, -(-length // len(pool)))
    return torch.cat([pool[torch.randperm(len(pool), generator=generator)] for _ in range(rounds)])[:length]


def relabel(labels: Tensor, probs: Tensor, threshold: float) -> Tensor:
    """Replace labels (N,) by the predicted class if its probability (N, C) is above ``threshold``: (N,) int64."""
    confidence, predicted = probs.max(1)
    return torch.where(confidence > threshold, predicted, labels)


def members_by_class(pool: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sort the members of ``pool`` (n,) by their labels (n,): members (n,), and the size of each class, (C,)."""
    return pool[labels.argsort(stable=True)], labels.bincount(minlength=num_classes)


def class_balanced_draw(members: Tensor, sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sample ``count`` members with replacement: first a non-empty class, then one of its members.

    Args:
        members: members from :func:`members_by_class`, shape (n,), n >= 1, on the CPU.
        sizes: class sizes from :func:`members_by_class`, shape (C,).
        count: number of samples.
        generator: random generator, on the CPU.

    Returns:
        Positions, shape (count,).
    """
    present = sizes.nonzero()[:, 0]
    classes = present[torch.randint(len(present), (count,), generator=generator)]
    place = (torch.rand(count, generator=generator, dtype=torch.float64) * sizes[classes]).long()
    return members[(sizes.cumsum(0) - sizes)[classes] + place]


def class_sets(members: Tensor, sizes: Tensor, sets: int, size: int, generator: torch.Generator) -> Tensor:
    """Sample sets of members of one class, with equal numbers of sets for all non-empty classes.

    Classes, and the members of a class, come in repeated random permutations. A set has different members, unless the class
    has fewer than ``size``.

    Args:
        members: members from :func:`members_by_class`, shape (n,), n >= 1, on the CPU.
        sizes: class sizes from :func:`members_by_class`, shape (C,).
        sets: number of sets.
        size: K, number of members of a set.
        generator: random generator, on the CPU.

    Returns:
        Positions, shape (sets, K).
    """
    classes = repeated_draw(sizes.nonzero()[:, 0], sets, generator)
    chosen = torch.empty((sets, size), dtype=torch.int64)
    for number, part in enumerate(members.split(sizes.tolist())):
        rows = (classes == number).nonzero()[:, 0]
        whole = len(part) // size * size or len(part)  # of a permutation, so that no set extends over two of them
        rounds = -(-len(rows) * size // whole) if len(rows) else 0
        drawn = [part[torch.randperm(len(part), generator=generator)[:whole]] for _ in range(rounds)]
        if drawn:
            chosen[rows] = torch.cat(drawn)[: len(rows) * size].view(-1, size)
    return chosen


def critical_threshold(weights: list[Tensor], gradients: list[Tensor], fraction: float) -> Tensor:
    """Return the smallest score |g w| of the critical weights: the int(fraction P)-th largest of all P.

    Source: Xia et al., ICLR 2021.

    Args:
        weights: tensors of any shape, ranked together.
        gradients: gradients of the weights.
        fraction: fraction of critical weights, in [0, 1]; at least one weight is critical.

    Returns:
        A scalar on the device of the weights, without synchronization.
    """
    scores = torch.cat([(w * g).abs().flatten() for w, g in zip(weights, gradients, strict=True)]).float()
    critical = max(1, int(fraction * len(scores) + 1e-6))
    return scores.kthvalue(len(scores) - critical + 1).values
