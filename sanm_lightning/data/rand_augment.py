"""RandAugment in the form of FixMatch's PyTorch port, which the code of SANM uses: operations, levels, cutout.

Source: Sohn et al., NeurIPS 2020, Table 12, and github.com/kekmodel/FixMatch-pytorch, ``RandAugmentMC(n=2, m=10)``.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from sanm_lightning.data.operations import cutout
from sanm_lightning.data.stages import NUMBER, Stage, coin

__all__ = ["LEVELS", "POOL", "SIGNED", "amounts_of_levels", "cut_square", "draw_cutout", "draw_rand_augment"]

LEVELS = 10
"""Levels 1 to 9 are sampled; 10 is the end of the range of an operation."""

Amount = Callable[[int, int, int], float]


def _factor(level: int, height: int, width: int) -> float:
    return level * 0.9 / LEVELS + 0.05


POOL: tuple[tuple[str, Amount], ...] = (
    ("autocontrast", lambda level, height, width: 0.0),
    ("brightness", _factor),
    ("saturation", _factor),
    ("contrast", _factor),
    ("equalize", lambda level, height, width: 0.0),
    ("identity", lambda level, height, width: 0.0),
    ("posterize", lambda level, height, width: 4 + 4 * level // LEVELS),
    ("rotate", lambda level, height, width: 30 * level // LEVELS),
    ("sharpness", _factor),
    ("shear_x", lambda level, height, width: level * 0.3 / LEVELS),
    ("shear_y", lambda level, height, width: level * 0.3 / LEVELS),
    ("solarize", lambda level, height, width: 256 - 256 * level // LEVELS),
    ("translate_x", lambda level, height, width: int(level * 0.3 / LEVELS * width)),
    ("translate_y", lambda level, height, width: int(level * 0.3 / LEVELS * height)),
)
"""Fourteen operations: name, and function (level, height, width) to the amount, whole numbers rounded down as in the
port. At 32 pixels, levels 1 to 9 translate by 0 to 8 pixels."""

SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
"""Operations whose amount has a random sign."""


@lru_cache(maxsize=16)
def amounts_of_levels(height: int, width: int) -> Tensor:
    """Return the amounts of all operations, levels 1 to 9 and signs (minus, plus), shape (14, 9, 2), float32."""
    rows = [
        [
            (-size if name in SIGNED else size, size)
            for size in (amount(level, height, width) for level in range(1, LEVELS))
        ]
        for name, amount in POOL
    ]
    return torch.tensor(rows, dtype=torch.float32)


def draw_rand_augment(
    batch: int, height: int, width: int, generator: torch.Generator, operations: int = 2
) -> list[Stage]:
    """Sample RandAugment as in FixMatch's PyTorch port: each operation with probability 1/2, at a level of 1 to 9.

    Args:
        batch: B, number of images.
        height: height of the images in pixels.
        width: width of the images in pixels.
        generator: random generator, on the CPU.
        operations: number of stages, each sampled from the pool with replacement.

    Returns:
        The stages, to be applied in order.
    """
    numbers = torch.tensor([NUMBER[name] for name, _ in POOL])
    amounts = amounts_of_levels(height, width)
    stages = []
    for _ in range(operations):
        place = torch.randint(len(POOL), (batch,), generator=generator)
        level = torch.randint(1, LEVELS, (batch,), generator=generator)
        plus, used = coin((batch,), generator), coin((batch,), generator)
        operation = torch.where(used, numbers[place], NUMBER["identity"])
        stages.append(Stage(operation, amounts[place, level - 1, plus.long()]))
    return stages


def draw_cutout(batch: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample one pixel per image, uniformly: rows and columns, shape (B,), int64, for :func:`cut_square`."""
    row, column = (torch.randint(size, (batch,), generator=generator) for size in (height, width))
    return row, column


def cut_square(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Fill a square around a pixel with gray 127, as the port does.

    A square that exceeds the image at the top or left is moved inside, one that exceeds it at the bottom or right is
    clipped. Its side is half of the shorter side of the image plus one pixel; at 32 pixels, it covers .246 of the image
    on average. Departure: the port has 17 pixels at any image size.

    Args:
        images: bytes, shape (B, C, H, W).
        row: row of the pixel, shape (B,), from :func:`draw_cutout`.
        column: column of the pixel, shape (B,).

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    half = min(images.shape[2:]) // 4
    row, column = (part.to(images.device, non_blocking=True).clamp(min=half) for part in (row, column))
    return cutout(images, row, column, 2 * half + 1)
