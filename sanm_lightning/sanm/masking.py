"""Mask ratio, mask box and fill (SANM, Eq. 2 to 5)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sanm_lightning.sanm.options import made_from

__all__ = [
    "RATIO_RANGES",
    "Ratio",
    "RatioName",
    "affine_ratio",
    "apply_mask",
    "fixed_ratio",
    "inside_box",
    "mask_box",
    "mask_ratio",
    "masked_fraction",
    "random_ratio",
    "resolve_ratio",
    "shuffled_ratio",
    "two_level_ratio",
]


def _check_quality(quality: Tensor) -> None:
    if quality.ndim != 1:
        raise ValueError(f"expected label quality (B,), got shape {tuple(quality.shape)}")
    # Values are checked on the CPU only, because the check would synchronize with other devices.
    if quality.device.type == "cpu" and not bool(((quality >= 0) & (quality <= 1)).all()):
        raise ValueError(f"expected label quality in [0, 1], got {float(quality.min())} to {float(quality.max())}")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"expected {name} in [0, 1], got {value}")


def mask_ratio(quality: Tensor, mu: float) -> Tensor:
    """Return the noise-aware mask ratio r = mu (1 - G).

    Source: SANM (Tu et al., CVPR 2023), Eq. 2.

    Args:
        quality: probability G that each given label is correct, shape (B,), in [0, 1].
        mu: basic mask ratio, in [0, 1].

    Returns:
        Fraction of the image area to mask, shape (B,), in [0, mu].

    Raises:
        ValueError: if ``quality`` is not (B,), ``mu`` is outside [0, 1], or (on CPU) a quality is outside [0, 1].
    """
    _check_fraction("mu", mu)
    _check_quality(quality)
    return mu * (1 - quality)


def fixed_ratio(quality: Tensor, mu: float) -> Tensor:
    """Return ``mu`` for every image. Source: SANM, Figure 2, "Fixed". Shapes and errors as :func:`mask_ratio`."""
    _check_fraction("mu", mu)
    _check_quality(quality)
    return torch.full_like(quality, mu)


def random_ratio(quality: Tensor, low: float, high: float, generator: torch.Generator | None = None) -> Tensor:
    """Return ratios sampled from U(low, high) for all labels. Source: SANM, Figure 2, "Random" (.2 to .4).

    Shapes and errors as :func:`mask_ratio`.
    """
    _check_fraction("low", low)
    _check_fraction("high", high)
    _check_quality(quality)
    drawn = torch.rand(quality.shape, generator=generator, device=quality.device, dtype=torch.float32)
    return (low + (high - low) * drawn).clamp(max=1)  # rounding may exceed 1


def two_level_ratio(quality: Tensor, clean: float, noisy: float) -> Tensor:
    """Return ``clean`` for labels that are more likely correct than wrong (G >= .5), and ``noisy`` for others.

    Source: SANM, Figure 2, "Noise-aware" (.2 and .3). Shapes and errors as :func:`mask_ratio`.
    """
    _check_fraction("clean", clean)
    _check_fraction("noisy", noisy)
    _check_quality(quality)
    return torch.where(quality >= 0.5, clean, noisy).to(quality.dtype)


def affine_ratio(
    quality: Tensor, mu: float, low: float, high: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return a random offset plus the noise-aware ratio: U(low, high) + mu (1 - G), at most 1.

    Source: the authors' released code (low .02, high .07, mu .03). Shapes and errors as :func:`mask_ratio`.
    """
    return (random_ratio(quality, low, high, generator) + mask_ratio(quality, mu)).clamp(max=1)


def shuffled_ratio(quality: Tensor, mu: float, generator: torch.Generator | None = None) -> Tensor:
    """Return the noise-aware ratios of a batch in random order.

    Not in the paper: a control with the same masked area in total, in which the ratio of an image does not depend on its
    label. Shapes and errors as :func:`mask_ratio`.
    """
    order = torch.rand(quality.shape, generator=generator, device=quality.device, dtype=torch.float32).argsort()
    return mask_ratio(quality, mu)[order]


Ratio = Callable[..., Tensor]
"""(quality (B,), generator=...) -> the fraction of each image to mask, (B,), in [0, 1]."""

RatioName = Literal["noise_aware", "fixed", "random", "two_level", "affine", "shuffled"]
"""Names of the ratios of the package, see :func:`resolve_ratio`."""

RATIO_RANGES = {"random": (0.2, 0.4), "two_level": (0.2, 0.3), "affine": (0.02, 0.07)}
"""Published low and high of the ratios with a range."""


def _without_draws(
    function: Callable[..., Tensor], *arguments: Any, generator: torch.Generator | None = None
) -> Tensor:
    """Return the ratio of a function that draws nothing; the last argument is the quality. A ``partial`` can be pickled."""
    *options, quality = arguments
    return function(quality, *options)


def resolve_ratio(ratio: Any, mu: float, low: float, high: float) -> Ratio:
    """Convert the ``ratio`` option of SANM to a callable.

    Args:
        ratio: ``"noise_aware"``, ``"fixed"``, ``"random"``, ``"two_level"``, ``"affine"``, ``"shuffled"``, or a callable
            (quality (B,), generator=...) -> (B,); or the import path of a callable, as in checkpoints.
        mu: basic mask ratio.
        low: lower bound for ``"random"``, ``"two_level"`` and ``"affine"``.
        high: upper bound for these.

    Returns:
        The callable.

    Raises:
        ValueError: if it is none of these.
    """
    ratios: dict[str, Ratio] = {
        "noise_aware": partial(_without_draws, mask_ratio, mu),
        "fixed": partial(_without_draws, fixed_ratio, mu),
        "random": partial(random_ratio, low=low, high=high),
        "two_level": partial(_without_draws, two_level_ratio, low, high),
        "affine": partial(affine_ratio, mu=mu, low=low, high=high),
        "shuffled": partial(shuffled_ratio, mu=mu),
    }
    ratio = made_from(ratio) if isinstance(ratio, dict) else ratio
    found = ratios.get(ratio) if isinstance(ratio, str) else ratio
    if not callable(found):
        raise ValueError(
            f"expected a ratio among {', '.join(ratios)}, or a callable, got {ratio!r}; choose one of them"
        )
    return found


def mask_box(activation: Tensor, ratio: Tensor, aspect: Tensor, *, anchor: str = "center") -> Tensor:
    """Return a box with the given area and aspect at the first maximum of each map.

    Source: SANM (Tu et al., CVPR 2023), Eq. 4: the maximum is the box's center, and the box is clipped to the image, so that
    it is smaller than ``ratio`` near a border. In the released code (``anchor="corner"``), the maximum is the box's top
    left pixel, the sides are rounded to whole pixels, and a box that crosses the border is shifted inside. Not in the
    paper: ``anchor="inside"`` centers such a box at the maximum, so that its area does not depend on its position.

    Args:
        activation: activation maps at image size, shape (B, H, W).
        ratio: fraction of the image area to mask, shape (B,), in [0, 1].
        aspect: height over width of the box, shape (B,), positive.
        anchor: ``"center"``, ``"corner"`` or ``"inside"``.

    Returns:
        Edges up, down, left, right, shape (B, 4), float32, in pixels: 0 <= up <= down <= H, 0 <= left <= right <= W.
        A box of h whole rows ends at up + h - 1/2, between its last row and the next.

    Raises:
        ValueError: if the shapes do not match, ``anchor`` is unknown, or (on CPU) a ratio is outside [0, 1] or an
            aspect is not positive.
    """
    if activation.ndim != 3 or ratio.shape != activation.shape[:1] or aspect.shape != ratio.shape:
        raise ValueError(
            "expected activation (B, H, W), ratio (B,) and aspect (B,), got "
            f"{tuple(activation.shape)}, {tuple(ratio.shape)} and {tuple(aspect.shape)}"
        )
    if ratio.device.type == "cpu" and not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(f"expected ratio in [0, 1], got {float(ratio.min())} to {float(ratio.max())}")
    if aspect.device.type == "cpu" and not bool((aspect > 0).all()):
        raise ValueError(f"expected a positive aspect, got {float(aspect.min())}")
    if anchor not in ("center", "corner", "inside"):
        raise ValueError(f"expected anchor 'center', 'corner' or 'inside', got {anchor!r}; choose one of them")
    height, width = activation.shape[1:]
    where = activation.flatten(1).argmax(1)  # (B,), the first of equal maxima
    row, column = where // width, where % width
    # always float32: bf16 represents whole pixels up to 256 only
    area = height * width * ratio.float()
    if anchor != "center":
        rows = (area * aspect.float()).sqrt().round().clamp(max=height)
        columns = (area / aspect.float()).sqrt().round().clamp(max=width)
        if anchor == "inside":
            row, column = (row - rows // 2).clamp(min=0), (column - columns // 2).clamp(min=0)
        up, left = torch.minimum(row, height - rows), torch.minimum(column, width - columns)
        # inside_box includes both edges, and boxes with equal edges are empty
        return torch.stack([up, (up + rows - 0.5).clamp(min=0), left, (left + columns - 0.5).clamp(min=0)], dim=1)
    half_height = (area * aspect.float() / 4).sqrt()
    half_width = (area / aspect.float() / 4).sqrt()
    return torch.stack(
        [
            (row - half_height).clamp(min=0),
            (row + half_height).clamp(max=height),
            (column - half_width).clamp(min=0),
            (column + half_width).clamp(max=width),
        ],
        dim=1,
    )


def inside_box(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which pixels are in the box of each image, edges included; boxes without area contain no pixels.

    Source: SANM, Eq. 5.

    Args:
        box: up, down, left, right in pixels, shape (B, 4).
        size: H, W in pixels.

    Returns:
        Shape (B, 1, H, W), bool.

    Raises:
        ValueError: if ``box`` is not (B, 4).
    """
    rows, columns = _sides(box, size)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _sides(box: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return which rows (B, H) and columns (B, W) are in each box; none for boxes without area."""
    if box.ndim != 2 or box.shape[1] != 4:
        raise ValueError(f"expected boxes (B, 4) of up, down, left, right, got {tuple(box.shape)}")
    up, down, left, right = (edge.unsqueeze(1) for edge in box.unbind(1))
    row = torch.arange(size[0], device=box.device)
    column = torch.arange(size[1], device=box.device)
    filled = (down > up) & (right > left)
    return (up <= row) & (row <= down) & filled, (left <= column) & (column <= right)


def masked_fraction(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the fraction of pixels of each image inside its box, shape (B,), float32, in [0, 1]."""
    rows, columns = _sides(box, size)
    return rows.float().mean(1) * columns.float().mean(1)


def apply_mask(
    images: Tensor,
    box: Tensor,
    *,
    fill: str = "pixel",
    generator: torch.Generator | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Fill each image's box with noise from U(0, 1).

    Source: SANM (Tu et al., CVPR 2023), Eq. 5, for images in [0, 1]. The equation does not specify whether U(0, 1) is
    sampled per box or per pixel; the released code samples one constant per channel (and fills normalized images).

    Args:
        images: shape (B, C, H, W), floating, in [0, 1], or normalized by ``normalize``. Not modified.
        box: up, down, left, right in pixels, shape (B, 4).
        fill: ``"pixel"`` samples each pixel and channel, ``"channel"`` samples once per image and channel.
        generator: random generator of the fill, on the device of ``images``; None uses the global one.
        normalize: normalization of the images, applied to the fill; None for images in [0, 1].

    Returns:
        New images of the same shape, dtype and device.

    Raises:
        ValueError: if the shapes do not match, ``images`` are not floating, or ``fill`` is unknown.
    """
    if images.ndim != 4 or not images.is_floating_point() or box.shape != (len(images), 4):
        raise ValueError(
            f"expected floating images (B, C, H, W) and box (B, 4), got {tuple(images.shape)} of {images.dtype} "
            f"and {tuple(box.shape)}"
        )
    if fill not in ("pixel", "channel"):
        raise ValueError(f"expected fill 'pixel' or 'channel', got {fill!r}")
    drawn = tuple(images.shape) if fill == "pixel" else (*images.shape[:2], 1, 1)
    noise = _uniform(drawn, images.device, generator)
    noise = (noise if normalize is None else normalize(noise)).to(images.dtype)
    return torch.where(inside_box(box, (images.shape[2], images.shape[3])), noise, images)


def _uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Sample U(0, 1), float32; on the CPU, four 16-bit values per word, because sampling dominates the cost."""
    if device.type != "cpu":
        return torch.rand(shape, generator=generator, device=device)
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape).float().add_(2**15 + 0.5).mul_(2**-16)
