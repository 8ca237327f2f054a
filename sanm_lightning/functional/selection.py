"""Selection of training samples and of critical weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Refurbishing",
    "class_balanced_draw",
    "class_quota",
    "class_sets",
    "consistent_votes",
    "critical_threshold",
    "label_ratio",
    "members_by_class",
    "pair_threshold",
    "refurbish",
    "refurbished_quality",
    "relabel",
    "repeated_draw",
    "sequence_credibility",
    "small_loss",
    "small_loss_among",
    "threshold_split",
    "uncertainty_weights",
]


def small_loss(losses: Tensor, fraction: float, round_up: bool = False) -> Tensor:
    """Select the int(fraction B) samples of smallest loss, or ceil(fraction B), at least one: losses (B,) -> (B,) bool."""
    exact = fraction * len(losses)  # .3 * 10 is 2.9999... in floating point
    kept = max(1, math.ceil(exact - 1e-6) if round_up else int(exact + 1e-6))
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


def sequence_credibility(scores: Tensor, count: Tensor) -> Tensor:
    """Return the geometric mean of the stored probabilities of each sample, the likelihood of a sequence per element.

    Args:
        scores: probabilities that the label is correct, shape (N, T), of which the first min(count, T) are used.
        count: number of stored probabilities, shape (N,).

    Returns:
        Shape (N,), in [0, 1]; 1 without probabilities.
    """
    used = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
    logs = torch.where(used, scores.float().clamp(min=1e-12).log(), 0.0)
    return (logs.sum(1) / used.sum(1).clamp(min=1)).exp()


def label_ratio(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the ratio of the probability of each label to the largest one, probs (N, C), labels (N,) -> (N,) in [0, 1]."""
    return probs.gather(1, labels[:, None])[:, 0] / probs.amax(1).clamp(min=1e-12)


class Refurbishing(NamedTuple):
    """Labels of a batch of SELFIE after the samples whose predictions agree were relabeled."""

    labels: Tensor
    """(B,) int64."""
    replaced: Tensor
    """(B,) bool: whether the label was replaced, now or before."""
    agreed: Tensor
    """(B,) bool: whether the predictions agree now."""
    certainty: Tensor
    """(B,) in [0, 1]: 1 minus the normalized entropy of the predictions."""


def refurbish(votes: Tensor, required: int, uncertainty: float, labels: Tensor, replaced: Tensor) -> Refurbishing:
    """Replace the labels of samples whose predictions agree by the most frequent prediction.

    Source: SELFIE (Song et al., ICML 2019), Algorithm 1, lines 12 to 19.

    Args:
        votes: count of each class among the last predictions, shape (B, C).
        required: number of predictions without which a label is not replaced.
        uncertainty: largest normalized entropy of predictions that agree, in [0, 1].
        labels: current labels, shape (B,), int64.
        replaced: whether the current label was replaced before, shape (B,), bool.
    """
    majority, doubt = consistent_votes(votes)
    agreed = (votes.sum(1) >= required) & (doubt <= uncertainty)
    return Refurbishing(torch.where(agreed, majority, labels), replaced | agreed, agreed, 1 - doubt)


def refurbished_quality(found: Refurbishing, losses: Tensor, before: Tensor) -> Tensor:
    """Return the quality of the labels of a batch of SELFIE, for SANM; not specified in either paper.

    Args:
        found: labels of the batch.
        losses: losses of the given labels, shape (B,).
        before: quality before the step, shape (B,), which labels replaced earlier keep.

    Returns:
        Shape (B,), in [0, 1]: the certainty where predictions agree; otherwise, for labels that were not replaced, from 1 to 0
        by the rank of the loss.
    """
    rank = losses.argsort().argsort() / max(1, len(losses) - 1)
    return torch.where(found.agreed, found.certainty, torch.where(found.replaced, before, 1 - rank))


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


def class_quota(scores: Tensor, labels: Tensor, agreeing: Tensor, num_classes: int, quantile: float = 0.5) -> Tensor:
    """Select the same number of samples of smallest score from each class.

    Source: MOIT (Ortego et al., CVPR 2021), Section 3.2, with the median over classes; Sel-CL (Li et al., CVPR 2022) uses
    another quantile.
    Departure: classes without samples are not counted.

    Args:
        scores: shape (N,).
        labels: shape (N,).
        agreeing: samples that are counted, shape (N,), bool.
        num_classes: C, number of classes.
        quantile: the number is this quantile over classes of the number of agreeing samples, in [0, 1]; the lower median for
            0.5, rounded down for others. Smaller classes are selected completely.

    Returns:
        Shape (N,), bool.
    """
    sizes = labels.bincount(minlength=num_classes)
    counts = labels[agreeing].bincount(minlength=num_classes)[sizes > 0].float()
    quota = counts.median() if quantile == 0.5 else counts.quantile(quantile).floor()
    by_score = scores.argsort(stable=True)
    order = by_score[labels[by_score].argsort(stable=True)]  # by class, then by score
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    return torch.zeros_like(agreeing).scatter_(0, order, place < quota)


def pair_threshold(
    features: Tensor, labels: Tensor, num_classes: int, quantile: float, generator: torch.Generator, draws: int = 64
) -> Tensor:
    """Return a quantile of the cosine similarity of samples with the same label, from random pairs.

    Source: Sel-CL (Li et al., CVPR 2022), Section 3.2, and the authors' code, which samples 500 pairs per sample.

    Args:
        features: normalized embeddings, shape (n, P), n >= 1.
        labels: shape (n,).
        num_classes: C, number of classes.
        quantile: in [0, 1].
        generator: random generator, on the CPU.
        draws: number of pairs per sample. The other sample is never the sample itself, unless its class has no other.

    Returns:
        A scalar.
    """
    order = labels.argsort(stable=True)
    sizes = labels.bincount(minlength=num_classes)
    size, first = sizes[labels[order]], (sizes.cumsum(0) - sizes)[labels[order]]
    place = torch.arange(len(order), device=order.device) - first
    found = []
    for _ in range(draws):
        step = torch.rand(len(order), generator=generator, dtype=torch.float64).to(order.device) * (size - 1)
        partner = order[first + (place + 1 + step.long()) % size]
        found.append((features[order] * features[partner]).sum(1))
    similarity = torch.cat(found)
    return similarity.kthvalue(1 + int(quantile * (len(similarity) - 1))).values


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
