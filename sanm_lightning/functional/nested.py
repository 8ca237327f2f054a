"""Ordered dropout of features, and the accuracy of a linear classifier with each number of features."""

import torch
from torch import Tensor

__all__ = ["nested_probabilities", "truncated_accuracy"]


def nested_probabilities(width: int, sigma: float) -> Tensor:
    """Return the probabilities of keeping the first 1, ..., D features: proportional to exp(-(k / sigma)^2).

    Source: Chen et al., CVPR Workshops 2021, and the authors' code.

    Args:
        width: D, number of features.
        sigma: width of the distribution in features, positive; inf is the uniform distribution.

    Returns:
        Shape (D,), float64, sum 1.
    """
    k = torch.arange(1, width + 1, dtype=torch.float64)
    return (-(k / sigma).square()).softmax(0)


def truncated_accuracy(
    features: Tensor, weight: Tensor, bias: Tensor | float, labels: Tensor, elements: int = 2**24
) -> Tensor:
    """Return the accuracy of linear classifiers that use the first 1, ..., D features, with incremental logits.

    Args:
        features: inputs of the classifier of each of n networks, shape (n, N, D).
        weight: weights of the classifiers, shape (n, C, D).
        bias: sum of the biases, shape (C,) or a scalar. The logits of the networks are added.
        labels: shape (N,), int64.
        elements: number of logits that are computed at once.

    Returns:
        Shape (D,), float64, in [0, 1].
    """
    correct = torch.zeros(features.shape[2], dtype=torch.float64, device=features.device)
    rows = max(1, elements // weight[0].numel())
    for part, wanted in zip(features.float().split(rows, 1), labels.split(rows), strict=True):
        terms = torch.einsum("nbd,ncd->bdc", part, weight.float())
        logits = terms.cumsum(1) + bias  # (b, D, C)
        correct += (logits.argmax(2) == wanted[:, None]).sum(0)
    return correct / len(labels)
