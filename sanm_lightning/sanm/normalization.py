"""Statistics of normalized images, to make fill and reconstruction in [0, 1]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Normalization"]


class Normalization(nn.Module):
    """Conversion between images in [0, 1] and normalized images (x - mean) / std.

    The statistics are not part of the state dict.

    Args:
        mean: mean of each channel, or one value for all channels.
        std: standard deviation of each channel, or one value for all channels; positive.

    Raises:
        ValueError: if the numbers of values differ, a value is not finite, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means, stds = _values(mean), _values(std)
        if len({len(means), len(stds), 1}) > 2 or not all(map(math.isfinite, means + stds)) or min(stds) <= 0:
            raise ValueError(
                f"expected a mean and a positive std for each channel of the images, or one for all, got mean {mean} "
                f"and std {std}; use the values of the normalization of the images"
            )
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_arguments(cls, mean: Any, std: Any) -> "Normalization | None":
        """Return the normalization of two optional arguments; None if both are None.

        Raises:
            ValueError: if one of them is None, or the values are not valid.
        """
        if mean is None and std is None:
            return None
        if mean is None or std is None:
            raise ValueError(
                f"expected mean and std of the images, got mean {mean} and std {std}; pass both, or neither for "
                "images in [0, 1]"
            )
        return cls(mean, std)

    @classmethod
    def of_network(cls, network: Any) -> "Normalization":
        """Return the normalization that a network applies to images in [0, 1], its ``mean`` and ``std``.

        Raises:
            ValueError: if the network does not normalize.
        """
        mean, std = (getattr(network, name, None) for name in ("mean", "std"))
        if not (isinstance(mean, Tensor) and isinstance(std, Tensor)):
            raise ValueError(
                f"expected a network with mean and std for scale: normalized, got {type(network).__name__} without them; "
                "use scale: unit, or networks by name"
            )
        return cls(mean.flatten().tolist(), std.flatten().tolist())

    @property
    def is_identity(self) -> bool:
        """Whether images are left unchanged. It synchronizes with the device."""
        return bool((self.mean == 0).all()) and bool((self.std == 1).all())

    @property
    def channels(self) -> int:
        """Number of channels of the statistics, 1 for any number."""
        return max(len(self.mean), len(self.std))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images (..., C, H, W) in [0, 1]."""
        return (images - self.mean) / self.std

    def denormalize(self, images: Tensor) -> Tensor:
        """Convert normalized images (..., C, H, W) back to [0, 1]."""
        return images * self.std + self.mean


def _values(given: float | Sequence[float]) -> list[float]:
    return [float(value) for value in torch.as_tensor(given, dtype=torch.float64).flatten()] or [math.nan]
