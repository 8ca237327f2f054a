"""Instance-dependent label noise: the wrong label is a function of the image."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sanm_lightning.data.noise_functions import check_labels, check_rate

__all__ = ["PixelScale", "Pixels", "instance_dependent"]

PixelScale = Literal["raw", "normalized"]
"""``raw``: gray values 0 to 255; ``normalized``: in units of the channels' mean and standard deviation."""

SPREAD = 0.1
"""Standard deviation of the flip rates before truncation."""
AT_ONCE = 2**26
"""Largest number of pixel values that are processed at once."""


class Pixels:
    """Images of the samples as vectors of pixel values, decoded in batches.

    Args:
        images: shape (N, 3, H, W), uint8, or a data set that decodes image i to (3, H, W).
        mean: channel means in [0, 1], for ``normalized``; None if unknown.
        std: channel standard deviations, for ``normalized``; None if unknown.
        positions: positions of the samples in ``images``, shape (n,). Default: all.
    """

    def __init__(
        self,
        images: Any,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.images, self.mean, self.std = images, mean, std
        self.positions = torch.arange(len(images)) if positions is None else positions

    def at(self, positions: Tensor) -> "Pixels":
        """Select samples by position."""
        return Pixels(self.images, self.mean, self.std, self.positions[positions])

    def read(self, scale: PixelScale) -> Tensor:
        """Return pixel values, channel by channel, shape (n, S), float64.

        Raises:
            ValueError: if the scale is ``normalized`` and mean or std are unknown.
        """
        if isinstance(self.images, Tensor):
            images = self.images[self.positions].double()
        else:
            images = torch.stack([self.images[row] for row in self.positions.tolist()]).double()
        if scale == "normalized":
            if self.mean is None or self.std is None:
                raise ValueError(
                    "expected the channel statistics of the data for noise with pixels 'normalized', got none; set "
                    "data.mean and data.std, or pixels: raw"
                )
            mean, std = (
                torch.tensor(tuple(part), dtype=torch.float64).view(-1, 1, 1) for part in (self.mean, self.std)
            )
            images = (images / 255 - mean) / std
        return images.flatten(1)


def instance_dependent(
    labels: Tensor,
    rate: float,
    num_classes: int,
    generator: torch.Generator,
    pixels: Pixels | Tensor,
    scale: PixelScale = "raw",
) -> Tensor:
    """Apply instance-dependent noise: the flip rate differs between samples, and the image determines the wrong label.

    Sample i of class y has flip rate q ~ N(rate, .1) truncated to [0, 1], and its label is drawn from
    ``q * softmax(x W[y])`` over the other classes and ``1 - q`` for y, where x are its pixel values and W[y] (S, C) is
    standard normal. The softmax is almost one-hot with raw pixel values, so that the wrong class is nearly a function of
    the image. The fraction of wrong labels is the mean of the truncated distribution, which is the rate at 50 % and
    higher at low rates (12.9 % for a rate of 10 %), up to the spread of the sampling.

    Source: Xia et al., NeurIPS 2020 (part-dependent label noise), Algorithm 2 of its supplement, and its code, which uses
    raw pixel values, as does that of CDR; that of DISC uses normalized ones. The random numbers differ from theirs.

    Args:
        labels: shape (N,), int64, in [0, C).
        rate: mean of the flip rates before truncation, in [0, 1].
        num_classes: C, 2 or more.
        generator: random generator, on the CPU.
        pixels: images of the samples, or a tensor (N, 3, H, W), uint8.
        scale: scale of the pixel values; the labels depend on it.

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: if labels or rate are invalid, or the number of images differs from that of the labels.
    """
    check_labels(labels, num_classes, "labels")
    check_rate(rate)
    if num_classes < 2:
        raise ValueError(f"expected 2 or more classes for noise that flips labels, got {num_classes}; use other noise")
    pixels = pixels if isinstance(pixels, Pixels) else Pixels(pixels)
    if len(pixels.positions) != len(labels):
        raise ValueError(
            f"expected one image per label for instance-dependent noise, got {len(pixels.positions)} images and "
            f"{len(labels)} labels; pass the images of these samples"
        )
    flip = truncated_normal(len(labels), rate, generator)
    noisy = labels.clone()
    size = pixels.at(torch.arange(1)).read(scale).shape[1] if len(labels) else 0
    for label in range(num_classes):
        weight = torch.randn(size, num_classes, generator=generator).double()
        for rows in (labels == label).nonzero()[:, 0].split(max(1, AT_ONCE // max(1, size))):
            score = pixels.at(rows).read(scale) @ weight
            score[:, label] = -torch.inf
            probs = flip[rows, None] * score.softmax(1)
            probs[:, label] = 1 - flip[rows]
            noisy[rows] = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return noisy


def truncated_normal(count: int, mean: float, generator: torch.Generator) -> Tensor:
    """Sample ``count`` values of N(mean, .1) truncated to [0, 1], float64."""
    low, high = (0.5 * (1 + math.erf((edge - mean) / SPREAD / math.sqrt(2))) for edge in (0.0, 1.0))
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn: Tensor = mean + SPREAD * torch.special.ndtri(low + uniform * (high - low))
    return drawn.clamp(0, 1)
