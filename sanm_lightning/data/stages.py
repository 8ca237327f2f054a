"""A stage of a policy: one operation per image, sampled on the CPU and applied to the batch on its device.

Sampling on the CPU avoids a synchronization with the device to find the images of each operation.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sanm_lightning.data.operations import MOVES, NEIGHBORS, OPERATIONS, SHEARS, TABLES, look_up, resample
from sanm_lightning.data.views import select_rows

__all__ = ["NAMES", "NUMBER", "Stage", "apply_stage", "coin"]

CACHED = 2**20
"""Bytes of images that an operation processes at once on the CPU; two to five times faster at 224 pixels than a batch."""

NAMES = list(OPERATIONS)
NUMBER = {name: number for number, name in enumerate(NAMES)}


class Stage(NamedTuple):
    """One operation for each image of a batch."""

    operation: Tensor
    """Positions in :data:`NAMES`, shape (B,), int64, on the CPU."""
    amount: Tensor
    """Amount of the operation, see :data:`OPERATIONS`, shape (B,), float32, on the CPU."""


def apply_stage(images: Tensor, stage: Stage, fill: int = 0) -> Tensor:
    """Apply one operation to each image.

    The images are sorted by operation, so that each operation, and each kind of operation, is one slice.

    Args:
        images: bytes, shape (B, C, H, W), on any device.
        stage: the operation of each image.
        fill: gray value of geometric operations outside of the image, 0 to 255.

    Returns:
        New images, bytes, shape (B, C, H, W).
    """
    order = stage.operation.argsort(stable=True)
    counts = stage.operation.bincount(minlength=len(NAMES)).tolist()
    here, back = (part.to(images.device, non_blocking=True) for part in (order, order.argsort()))
    sampled = stage.amount[order]
    amount = sampled.to(images.device, non_blocking=True)
    size = (images.shape[2], images.shape[3])
    ordered, first = select_rows(images, here), 0  # several times faster than indexing on the CPU
    tables, moves = [], []
    table_rows, move_rows = [], []
    for name, count in zip(NAMES, counts, strict=True):
        rows = slice(first, first := first + count)
        if not count or name == "identity":
            continue
        if name in MOVES:
            moves.append(MOVES[name](sampled[rows], size))  # on the CPU, in float64
            move_rows.append(rows)
            continue
        for part in _parts(ordered, rows):
            if name in TABLES:
                tables.append(TABLES[name](ordered[part], amount[part]))
                table_rows.append(part)
            elif name in SHEARS:
                ordered[part] = SHEARS[name](ordered[part], amount[part], fill)
            else:
                ordered[part] = NEIGHBORS[name](ordered[part], amount[part])
    if tables:  # contiguous: operations of one kind are adjacent
        rows, table = slice(table_rows[0].start, table_rows[-1].stop), torch.cat(tables)
        for part in _parts(ordered, rows):
            ordered[part] = look_up(ordered[part], table[part.start - rows.start : part.stop - rows.start])
    if moves:
        rows, matrix = slice(move_rows[0].start, move_rows[-1].stop), torch.cat(moves)
        for part in _parts(ordered, rows):
            ordered[part] = resample(ordered[part], matrix[part.start - rows.start : part.stop - rows.start], fill=fill)
    return select_rows(ordered, back)


def _parts(images: Tensor, rows: slice) -> list[slice]:
    """Split rows of images on the CPU into parts whose intermediate results stay in its cache; equal results."""
    if images.device.type != "cpu":
        return [rows]
    count = max(1, CACHED // images[0].numel())
    return [slice(first, min(first + count, rows.stop)) for first in range(rows.start, rows.stop, count)]


def coin(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sample booleans, true with probability 1/2."""
    return torch.rand(shape, generator=generator) < 0.5
