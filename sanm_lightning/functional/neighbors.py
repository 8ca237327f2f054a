"""Exact nearest neighbors by cosine similarity, in chunks, and labels by the labels of neighbors."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.functional.selection import class_quota
from sanm_lightning.functional.targets import keep_given

__all__ = [
    "SmoothedLabels",
    "balanced_votes",
    "class_means",
    "corrected_votes",
    "knn_vote",
    "nearest_neighbors",
    "neighbor_mean",
    "similar_samples",
    "smoothed_labels",
    "voted_selection",
    "weighted_neighbors",
]

CHUNK_VALUES = 2**27
"""Similarities, or values of neighbors, that are held at once: 0.5 GB in float32."""


def nearest_neighbors(features: Tensor, k: int, exclude_self: bool = True, chunk: int = 1024) -> Tensor:
    """Find the k samples of largest cosine similarity to each sample, without an (N, N) matrix or a copy of the features.

    Args:
        features: shape (N, D), not necessarily normalized.
        k: number of neighbors, 1 to N, or to N - 1 with ``exclude_self``.
        exclude_self: whether to exclude the sample itself, by index.
        chunk: number of rows searched at once.

    Returns:
        Positions, shape (N, k), int64, most similar first.

    Raises:
        ValueError: if k is out of its range.
    """
    return similar_samples(features, k, exclude_self, chunk)[0]


def similar_samples(
    features: Tensor, k: int, exclude_self: bool = True, chunk: int | None = None, first: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k samples of largest cosine similarity to each sample, and the similarities.

    Args:
        features: shape (N, D), not necessarily normalized.
        k: number of neighbors, 1 to N, or to N - 1 with ``exclude_self``.
        exclude_self: whether to exclude the sample itself, by index.
        chunk: number of rows searched at once; None chooses at most 1024 and 2^27 similarities.
        first: M, search for the first M samples only, among all; None searches for all samples.

    Returns:
        Positions, shape (M, k), int64, most similar first; cosine similarities, shape (M, k), float32.

    Raises:
        ValueError: if k is out of its range.
    """
    most = len(features) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"expected k in 1 to {most}, got {k} neighbors of {len(features)} samples; lower k")
    chunk = _rows(1024, len(features)) if chunk is None else chunk
    features = features.float()
    scale = 1 / torch.cat([rows.norm(dim=1) for rows in features.split(chunk)]).clamp(min=1e-12)
    found, values = [], []
    for start, rows in zip(range(0, len(features), chunk), features[:first].split(chunk), strict=False):
        similarity = (rows @ features.T).mul_(scale)  # without a normalized copy of all features
        if exclude_self:
            place = torch.arange(len(rows), device=rows.device)
            similarity[place, start + place] = float("-inf")
        top = similarity.topk(k, dim=1)
        found.append(top.indices)
        values.append(top.values * scale[start : start + len(rows), None])
    return torch.cat(found), torch.cat(values)


def weighted_neighbors(features: Tensor, k: int, temperature: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Find the nearest other samples, and their weights, in the form that :func:`neighbor_mean` takes.

    Args:
        features: shape (N, D), N >= 1, not necessarily normalized.
        k: number of neighbors, >= 0; at most N - 1 are returned.
        temperature: weights are proportional to exp(cosine similarity / temperature), positive; None for no weights.

    Returns:
        Positions, shape (N, min(k, N - 1)), int64, most similar first; weights of the same shape, rows sum to 1, or None.
    """
    k = min(k, len(features) - 1)
    if not k:
        return torch.empty((len(features), 0), dtype=torch.int64, device=features.device), None
    neighbors, similarity = similar_samples(features, k)
    return neighbors, None if temperature is None else (similarity / temperature).softmax(1)


def neighbor_mean(values: Tensor, neighbors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted mean of the values of the neighbors of each sample.

    Args:
        values: shape (N, C).
        neighbors: positions, shape (N, k); with k = 0, the result is ``values``.
        weights: shape (N, k), positive; None weights all neighbors equally.

    Returns:
        Shape (N, C).
    """
    if not neighbors.shape[1]:
        return values
    weights = torch.ones_like(neighbors, dtype=values.dtype) if weights is None else weights
    chunk = _rows(len(values), neighbors.shape[1] * values.shape[1])
    parts = zip(neighbors.split(chunk), weights.split(chunk), strict=True)
    sums = torch.cat([(weight[:, None] @ values[rows])[:, 0] for rows, weight in parts])
    return sums / weights.sum(1, keepdim=True)  # divided last: equal numbers of votes stay equal


def corrected_votes(labels: Tensor, neighbors: Tensor, num_classes: int, weights: Tensor | None = None) -> Tensor:
    """Let the neighbors vote on the label of each sample, and vote again with the labels that have won.

    Source: MOIT (Ortego et al., CVPR 2021), Section 3.2; one version of the code of Sel-CL (Li et al., CVPR 2022)
    weights the votes.

    Args:
        labels: shape (N,).
        neighbors: positions, shape (N, k).
        num_classes: C, number of classes.
        weights: weights of the votes, shape (N, k), positive; None weights all votes equally.

    Returns:
        Fractions of the second votes, shape (N, C); each row sums to 1.
    """
    first = neighbor_mean(F.one_hot(labels, num_classes).float(), neighbors, weights)
    return neighbor_mean(F.one_hot(first.argmax(1), num_classes).float(), neighbors, weights)


def voted_selection(
    labels: Tensor, neighbors: Tensor, weights: Tensor | None, num_classes: int, quantile: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Select the same number of samples per class by the fraction of the second votes for their labels.

    Source: MOIT (Ortego et al., CVPR 2021), Section 3.2; Sel-CL (Li et al., CVPR 2022), Section 3.2.

    Args:
        labels: given labels, shape (N,).
        neighbors: positions, shape (N, k).
        weights: as for :func:`corrected_votes`.
        num_classes: C, number of classes.
        quantile: as for :func:`class_quota`, of the number of samples whose label has the most votes.

    Returns:
        Fraction of the votes for each label, shape (N,), in [0.01, 0.99], 0.01 for features that are NaN; and whether each
        sample is selected, shape (N,), bool.
    """
    votes = corrected_votes(labels, neighbors, num_classes, weights)
    share = votes.gather(1, labels[:, None])[:, 0].nan_to_num(0.01).clamp(0.01, 0.99)
    return share, class_quota(-share, labels, votes.argmax(1) == labels, num_classes, quantile)


class SmoothedLabels(NamedTuple):
    """Soft labels of RRL that are smoothed over neighbors, and what follows from them; each with one row per sample."""

    targets: Tensor
    """(N, C): class probabilities, the one-hot row of the given label where it is kept."""
    labels: Tensor
    """(N,) int64: most probable classes."""
    selected: Tensor
    """(N,) bool: whether the largest probability is above the threshold."""
    quality: Tensor
    """(N,) in [0, 1]: probability of ``labels``, before given labels are kept."""
    given_quality: Tensor
    """(N,) in [0, 1]: probability of the given labels, before they are kept."""


def smoothed_labels(
    before: Tensor | None,
    probs: Tensor,
    given: Tensor,
    neighbors: Tensor,
    weights: Tensor | None,
    low_threshold: float,
    high_threshold: float,
) -> SmoothedLabels:
    """Return the mean of predictions and of the neighbors' soft labels, and the given label where it is probable enough.

    Source: RRL (Li et al., ICCV 2021), and the authors' code.

    Args:
        before: soft labels of the last epoch, shape (N, C); None starts from the predictions, with given labels kept.
        probs: predicted class probabilities, shape (N, C).
        given: given labels, shape (N,).
        neighbors: positions, shape (N, k).
        weights: as for :func:`neighbor_mean`.
        low_threshold: probability of the given label above which it is kept, in [0, 1].
        high_threshold: probability above which a sample is selected, in [0, 1].
    """
    before = keep_given(probs, given, low_threshold) if before is None else before
    smoothed = (neighbor_mean(before, neighbors, weights) + probs) / 2
    targets = keep_given(smoothed, given, low_threshold)
    confidence, labels = targets.max(1)
    quality, given_quality = (smoothed.gather(1, part[:, None])[:, 0].clamp(0, 1) for part in (labels, given))
    return SmoothedLabels(targets, labels, confidence > high_threshold, quality, given_quality)


def class_means(features: Tensor, labels: Tensor, num_classes: int, selected: Tensor | None = None) -> Tensor:
    """Return the mean of the features of each class, 0 for classes without samples.

    Args:
        features: shape (N, D).
        labels: shape (N,).
        num_classes: C, number of classes.
        selected: samples that are used, shape (N,), bool; None uses all samples.

    Returns:
        Shape (C, D).
    """
    members = F.one_hot(labels, num_classes).to(features.dtype)  # a product, since index_add_ is not deterministic
    members = members if selected is None else members * selected[:, None]
    return members.T @ features / members.sum(0).clamp(min=1)[:, None]


def _rows(most: int, width: int) -> int:
    """Return the number of rows of ``width`` values that are processed at once, 1 to ``most``."""
    return max(1, min(most, CHUNK_VALUES // max(1, width)))


def knn_vote(features: Tensor, labels: Tensor, k: int, num_classes: int, chunk: int = 1024) -> Tensor:
    """Return the votes of the k nearest samples, including the sample, on the class of each sample.

    Args:
        features: shape (N, D), not necessarily normalized.
        labels: labels of the samples, shape (N,).
        k: number of neighbors, 1 to N.
        num_classes: C, number of classes.
        chunk: number of rows searched at once.

    Returns:
        Fractions of the votes, shape (N, C); each row sums to 1.

    Raises:
        ValueError: if k is out of its range.
    """
    votes = F.one_hot(labels, num_classes).float()
    neighbors = nearest_neighbors(features, k, exclude_self=False, chunk=chunk)
    return torch.cat([torch.stack([votes[column] for column in rows.T]).mean(0) for rows in neighbors.split(chunk)])


def balanced_votes(votes: Tensor, labels: Tensor) -> Tensor:
    """Divide votes (N, C) by the frequency of each class among the labels (N,), and renormalize the rows."""
    prior = F.one_hot(labels, votes.shape[1]).float().mean(0)
    weighted = votes / (prior + 1e-10)
    return weighted / weighted.sum(1, keepdim=True).clamp(min=1e-10)
