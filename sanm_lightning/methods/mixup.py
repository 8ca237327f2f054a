"""Mixup (Zhang et al., ICLR 2018), with one share per batch."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Mixed", "mixup"]


class Mixed(NamedTuple):
    """A mixed batch, and how it was mixed, so that more can be mixed alike."""

    images: Tensor
    """(V, 3, H, W)."""
    targets: Tensor
    """(V, C)."""
    share: float
    """Weight of each row itself, in [0, 1]."""
    partners: Tensor
    """(V,), the row that each row is mixed with."""

    def mix(self, rows: Tensor) -> Tensor:
        """Mix further rows (V, ...) with the same share and partners."""
        return self.share * rows + (1 - self.share) * rows[self.partners]


def mixup(images: Tensor, targets: Tensor, generator: torch.Generator, alpha: float, larger_half: bool = True) -> Mixed:
    """Mix each image and its target with those of a random other row.

    Args:
        images: shape (V, 3, H, W).
        targets: class probabilities, shape (V, C).
        generator: source of all randomness, on the CPU.
        alpha: the share is drawn from Beta(alpha, alpha), once per batch; 0 mixes nothing.
        larger_half: take the larger of the share and its rest, so that a row stays mostly itself (MixMatch).

    Returns:
        The mixed batch, on the device of the images.

    Raises:
        ValueError: if alpha is negative.
    """
    if alpha < 0:
        raise ValueError(f"expected alpha >= 0, got {alpha}")
    seed = int(torch.randint(2**62, (), generator=generator))  # torch has no Beta that takes a generator
    share = float(np.random.default_rng(seed).beta(alpha, alpha)) if alpha > 0 else 1.0
    share = max(share, 1 - share) if larger_half else share
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    mixed = Mixed(images, targets, share, partners)
    return mixed if share == 1 else mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))
