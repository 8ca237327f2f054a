"""First-in, first-out queue of embeddings of past steps, with further values of each row."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Unaveraged
from sanm_lightning.random_streams import several_processes

__all__ = ["FeatureQueue", "Payload"]

Payload = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of the further values of a row, by name."""


class FeatureQueue(Unaveraged):
    """Embeddings of the last steps of all processes, newest first, the same in every process.

    Source: cross-batch memory (Wang et al., CVPR 2020) and MoCo (He et al., CVPR 2020).

    Args:
        size: K, number of rows.
        dim: P, width of the embeddings.
        payload: shape and dtype of the further values of a row, by name; each is an attribute of shape (K, ...).
    """

    features: Tensor
    """(K, P) float32."""
    valid: Tensor
    """(K,) bool: whether a row is filled."""

    def __init__(self, size: int, dim: int, payload: Payload | None = None) -> None:
        super().__init__()
        self.payload = payload or {}
        self.register_state("features", torch.zeros(size, dim))
        self.register_state("valid", torch.zeros(size, dtype=torch.bool))
        for name, (shape, dtype) in self.payload.items():
            self.register_state(name, torch.zeros(size, *shape, dtype=dtype))

    @torch.no_grad()
    def enqueue(self, features: Tensor, **payload: Tensor) -> None:
        """Add the rows of a step in front, and remove the oldest ones; new tensors, since gradients may need the old ones.

        A collective operation: every process must call it with the same number of rows.

        Args:
            features: embeddings, shape (B, P).
            payload: further values by name, shape (B, ...).
        """
        valid = torch.ones(len(features), dtype=torch.bool, device=features.device)
        for name, rows in {"features": features, "valid": valid, **payload}.items():
            old: Any = getattr(self, name)
            setattr(self, name, torch.cat([_gathered(rows.detach().to(old.dtype)), old])[: len(old)])

    def behind(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B, P) of a step, without gradient, followed by those of the queue, and which are filled."""
        filled = torch.ones(len(features), dtype=torch.bool, device=features.device)
        return torch.cat([features.detach(), self.features]), torch.cat([filled, self.valid])


def _gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of the ranks. A collective operation."""
    if not several_processes():
        return rows
    found = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(found, rows.contiguous())
    return torch.cat(found)
