"""Training views of a method."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Quality", "Views"]

Quality = Tensor | Callable[[Tensor], Tensor] | None


class Views(NamedTuple):
    """Training views of a step.

    V is B; 2B with two masked copies of each image (all at the maximum, then all at the minimum); plus B with
    ``keep_unmasked``, where the unmasked images come first.
    """

    images: Tensor
    """(V, 3, H, W), floating."""
    targets: Tensor
    """(V, C), class probabilities."""
    ratio: Tensor | None = None
    """(B,), the requested fraction of the area; None before the first mask."""
    box: Tensor | None = None
    """(B, 4), or (2B, 4) with two masked copies: up, down, left, right in pixels; None without masks."""
    activation: Tensor | None = None
    """(B, H, W), the map whose maximum is masked; None without masks."""
    logits: Tensor | None = None
    """(B, C), of the unmasked images, without gradient; None without an extra pass."""
    features: Tensor | None = None
    """(B, D, h, w), of the unmasked images, without gradient; None without an extra pass."""

    @property
    def masked(self) -> bool:
        """Whether SANM is active in this step, by masks, softened labels or reconstruction."""
        return self.ratio is not None

    def unmasked(self, logits: Tensor) -> Tensor:
        """Return the logits of the unmasked images, from the extra pass or from ``logits`` if nothing was masked."""
        if self.logits is not None:
            return self.logits
        return logits if self.ratio is None else logits[: len(self.ratio)]  # kept unmasked images come first

    def rows(self, chosen: Tensor, batch_size: int) -> Tensor:
        """Return the rows (K V / B,) of all views of images ``chosen`` (K,), positions in a batch."""
        return torch.cat([chosen + first for first in range(0, len(self.images), batch_size)])
