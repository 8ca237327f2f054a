"""Embeddings, and neighbors in feature space, of each sample."""

import torch
from torch import Tensor

from sanm_lightning.per_sample.state import SampleState
from sanm_lightning.per_sample.targets import LabelStore

__all__ = ["Embeddings", "NeighborGraph"]


class Embeddings(SampleState):
    """Embedding of each sample at the start of the epoch.

    Args:
        dim: P, width of the embeddings.
    """

    features: Tensor
    """(N, P) float32, normalized."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_state("features", (dim,), dist_reduce_fx=None)

    def update(self, index: Tensor, features: Tensor) -> None:
        """Set the rows of samples ``index`` (M,), the same in all processes."""
        self.features = self.features.index_copy(0, index, features.to(self.features))


class NeighborGraph(LabelStore):
    """Neighbors of each sample in feature space, and class probabilities that are averaged over them.

    Args:
        num_classes: C, number of classes.
        k: number of neighbors.
    """

    neighbors: Tensor
    """(N, k) int64: positions; -1 where there are fewer."""
    probs: Tensor
    """(N, C) float32: class probabilities of the last visit."""

    def __init__(self, num_classes: int, k: int) -> None:
        super().__init__(dist_reduce_fx=None)
        self.k = k
        self.add_state("neighbors", (k,), dtype=torch.int64, default=-1, dist_reduce_fx=None)
        self.add_state("probs", (num_classes,), default=1 / num_classes)

    def connect(self, index: Tensor, neighbors: Tensor) -> None:
        """Set the neighbors of the samples ``index`` (M,), as positions among these, shape (M, at most k)."""
        padded = torch.full((len(index), self.k), -1, device=index.device)
        padded[:, : neighbors.shape[1]] = index[neighbors]
        self.update(index, neighbors=padded)

    def neighbor_mean(self, index: Tensor) -> Tensor:
        """Return the mean probabilities of the neighbors of the samples ``index`` (B,), (B, C); their own without neighbors."""
        near = self.neighbors[index]
        known = (near >= 0).float()
        mean = (self.probs[near.clamp(min=0)] * known[..., None]).sum(1) / known.sum(1, keepdim=True).clamp(min=1)
        return torch.where(known.any(1, keepdim=True), mean, self.probs[index])
