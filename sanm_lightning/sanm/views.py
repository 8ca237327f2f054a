"""The views that a method learns from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Quality", "Views"]

Quality = Tensor | Callable[[Tensor], Tensor] | None


class Views(NamedTuple):
    """The views that a method learns from in this step.

    V is B; 2B with two masked copies of each image (all at the maximum, then all at the minimum); and B more when the unmasked
    images are kept, which come first.
    """

    images: Tensor
    """(V, 3, H, W), floating."""
    targets: Tensor
    """(V, C), class probabilities."""
    ratio: Tensor | None = None
    """(B,), the fraction of the area that was asked for; None before the first mask."""
    box: Tensor | None = None
    """(B, 4), or (2B, 4) with two masked copies: up, down, left, right in pixels; None where no mask was drawn."""
    activation: Tensor | None = None
    """(B, H, W), the map whose maximum was hidden; None likewise."""
    logits: Tensor | None = None
    """(B, C), of the unmasked images, without gradient; None where no extra pass was made."""
    features: Tensor | None = None
    """(B, D, h, w), of the unmasked images, without gradient; None likewise."""

    @property
    def masked(self) -> bool:
        """Whether SANM was at work: masks, label moves or reconstruction, before which the base method is plain."""
        return self.ratio is not None

    def unmasked(self, logits: Tensor) -> Tensor:
        """Return the logits of the unmasked images: of the extra pass, or, where nothing was masked, ``logits`` (B, C)."""
        if self.logits is not None:
            return self.logits
        return logits if self.ratio is None else logits[: len(self.ratio)]  # kept unmasked images come first

    def rows(self, chosen: Tensor, batch_size: int) -> Tensor:
        """Return the rows of all views of the images ``chosen``, (K,) positions in a batch of ``batch_size``: (K V / B,)."""
        return torch.cat([chosen + first for first in range(0, len(self.images), batch_size)])
