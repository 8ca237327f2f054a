"""Loss correction with a noise transition matrix, and its estimation."""

import math
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.functional.losses import soft_cross_entropy

__all__ = ["backward_correction", "check_transition", "estimate_transition", "forward_correction", "label_posterior"]


def check_transition(transition: Any, num_classes: int) -> Tensor:
    """Return a transition matrix as a tensor (C, C), float32.

    Args:
        transition: rows of the matrix; entry (i, j) is the probability that class i is labeled j.
        num_classes: C.

    Raises:
        ValueError: if the matrix is not square with C rows, not stochastic, or singular.
    """
    matrix = torch.as_tensor(transition, dtype=torch.float64)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(
            f"expected a transition matrix ({num_classes}, {num_classes}), got shape {tuple(matrix.shape)}; use one row and "
            "one column per class"
        )
    if bool((matrix < 0).any()) or not torch.allclose(
        matrix.sum(1), torch.ones(num_classes, dtype=torch.float64), atol=1e-3
    ):
        raise ValueError(
            f"expected a transition matrix with rows of probabilities, got sums from {matrix.sum(1).min():.4g} to "
            f"{matrix.sum(1).max():.4g} and a smallest entry of {matrix.min():.4g}; normalize its rows"
        )
    if int(torch.linalg.matrix_rank(matrix)) < num_classes:
        raise ValueError(
            f"expected an invertible transition matrix, got one of rank {int(torch.linalg.matrix_rank(matrix))} for "
            f"{num_classes} classes; mix it with the identity matrix"
        )
    return (matrix / matrix.sum(1, keepdim=True)).float()


def forward_correction(logits: Tensor, targets: Tensor, transition: Tensor) -> Tensor:
    """Return the cross-entropy of targets with the predicted distribution of noisy labels, T^T p.

    Source: Patrini et al., CVPR 2017, Theorem 2. It is computed from log-probabilities, so it is finite as p approaches 0.

    Args:
        logits: shape (B, C).
        targets: class probabilities of the noisy labels, shape (B, C).
        transition: T, shape (C, C), rows sum to 1: ``T[i, j]`` is the probability that class i is labeled j.

    Returns:
        Shape (B,), float32, >= 0.
    """
    return -(targets.float() * _log_noisy(logits, transition)).sum(1)


def backward_correction(logits: Tensor, targets: Tensor, transition: Tensor) -> Tensor:
    """Return the loss whose expectation over the noisy labels is the cross-entropy with the true labels.

    Source: Patrini et al., CVPR 2017, Theorem 1. The loss may be negative, and is not bounded from below.

    Args:
        logits: shape (B, C).
        targets: class probabilities of the noisy labels, shape (B, C).
        transition: T, shape (C, C), invertible.

    Returns:
        Shape (B,), float32.
    """
    return soft_cross_entropy(logits, targets.float() @ torch.linalg.inv(transition.float()))


def label_posterior(logits: Tensor, targets: Tensor, transition: Tensor) -> Tensor:
    """Return the probability that each label is correct, p_y T_yy / (T^T p)_y.

    Args:
        logits: shape (B, C).
        targets: given labels as one-hot rows, or class probabilities, shape (B, C).
        transition: T, shape (C, C).

    Returns:
        Shape (B,), float32, in [0, 1].
    """
    joint = logits.float().log_softmax(1) + transition.float().diagonal().clamp(min=1e-12).log()
    return (targets.float() * (joint - _log_noisy(logits, transition)).exp()).sum(1).clamp(0, 1)


def estimate_transition(probs: Tensor, percentile: float | None = 97.0) -> Tensor:
    """Estimate the transition matrix from predictions of a network that was trained on noisy labels.

    Source: Patrini et al., CVPR 2017, Eq. 12 and 13. Row i is the prediction for the anchor of class i, the sample with the
    largest probability of class i.

    Departure: the authors' code sets discarded probabilities to 0 in the matrix from which later rows are read; here, the
    probabilities are not modified.

    Args:
        probs: predicted class probabilities, shape (N, C), N >= 1.
        percentile: samples at or above this percentile of the class's probabilities are not anchors, which makes the estimate
            robust to outliers; published: 97 on CIFAR-10. None uses all samples.

    Returns:
        Shape (C, C), float32, rows sum to 1.
    """
    probs = probs.float()
    candidates = probs
    if percentile is not None:
        bound = probs.sort(0).values[math.ceil(percentile / 100 * (len(probs) - 1))]
        kept = probs < bound
        candidates = torch.where(kept | ~kept.any(0), probs, -1.0)
    rows = probs[candidates.argmax(0)]
    return rows / rows.sum(1, keepdim=True)


def _log_noisy(logits: Tensor, transition: Tensor) -> Tensor:
    """Return log(T^T p), (B, C)."""
    log_transition = transition.float().clamp(min=1e-12).log()
    return (logits.float().log_softmax(1).unsqueeze(2) + log_transition).logsumexp(1)
