"""Exact nearest neighbors by cosine similarity, in chunks, and votes of neighbors."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["balanced_votes", "knn_vote", "nearest_neighbors"]


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
    most = len(features) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"expected k in 1 to {most}, got {k} neighbors of {len(features)} samples; lower k")
    features = features.float()
    scale = 1 / torch.cat([rows.norm(dim=1) for rows in features.split(chunk)]).clamp(min=1e-12)
    found = []
    for first, rows in zip(range(0, len(features), chunk), features.split(chunk), strict=True):
        similarity = (rows @ features.T).mul_(scale)  # without a normalized copy of all features
        if exclude_self:
            place = torch.arange(len(rows), device=rows.device)
            similarity[place, first + place] = float("-inf")
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


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
