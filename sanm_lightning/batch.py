"""What crosses the borders between the rooms of this package."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["NoisyBatch"]


class NoisyBatch(NamedTuple):
    """One batch of images whose labels may be wrong.

    A plain named tuple, so ``images, labels, *_ = batch`` and ``batch[0]`` work as for the usual ``(x, y)`` pair.

    Attributes:
        images: shape (B, 3, H, W), floating, in [0, 1].
        labels: the given, possibly wrong class indices, shape (B,), int64.
        index: position of each sample in the training set, shape (B,), int64; None where samples have no identity.
        true_labels: the right class indices, shape (B,), int64, where they are known; None elsewhere. Read by metrics
            and by oracle label quality, and by nothing else.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch
    true_labels: Tensor | None = None
