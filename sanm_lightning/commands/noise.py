"""``sanm noise``: report the label noise of a data module, and write its labels to a file."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.data.label_table import LabelTable
from sanm_lightning.safe_files import atomic_write

__all__ = ["label_transition", "main", "noise"]

SHOWN = 10
"""Number of classes up to which the whole matrix is printed."""


def label_transition(true_labels: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the fraction of each true class (rows) with each given label (columns), shape (C, C), float64.

    Args:
        true_labels: shape (N,), int64, in [0, C).
        labels: given labels, shape (N,), int64, in [0, C).
        num_classes: C. The row of a class without samples is one-hot.
    """
    counts = (true_labels * num_classes + labels).bincount(minlength=num_classes**2).view(num_classes, num_classes)
    rows = counts.double()
    rows[counts.sum(1) == 0] = rows.new_zeros(num_classes)
    empty = counts.sum(1) == 0
    rows[empty, empty.nonzero()[:, 0]] = 1
    return rows / rows.sum(1, keepdim=True)


def noise(data: Any, out: str | None = None, matrix: str | None = None) -> int:
    """Report requested and actual noise rate and the transition matrix of the whole training set of a data module.

    Args:
        data: data module with its noise, such as ``--data CIFAR10 --data.noise.kind pair --data.noise.rate 0.3``. Subset and
            validation split have no effect.
        out: new ``.npz`` file of the labels, which ``--data.noise.kind file --data.noise.path OUT`` reads.
        matrix: new ``.csv`` or ``.npy`` file of the transition matrix, which ``--data.noise.kind transition
            --data.noise.matrix MATRIX`` reads.

    Returns:
        Exit status 0.

    Raises:
        ValueError: if the true labels are unknown, or a file has another extension.
        OSError: if a file exists or cannot be written.
    """
    for path, endings in ((out, (".npz",)), (matrix, (".csv", ".npy"))):
        if path is not None and Path(path).suffix not in endings:
            raise ValueError(f"expected a file with extension {' or '.join(endings)}, got {path!r}; rename it")
        if path is not None and Path(path).exists():
            raise FileExistsError(f"expected a new file, got {path!r}, which exists; choose another name")
    if not hasattr(data, "original_labels"):
        raise ValueError(
            f"expected a data module of this package, got {type(data).__name__}; use a subclass of NoisyDataModule"
        )
    data.prepare_data()
    table: LabelTable = data.original_labels()
    if table.true_labels is None:
        raise ValueError(
            f"expected known true labels, got {type(data).__name__} without noise of a kind that changes its labels; set "
            "data.noise, or use 'sanm audit' to estimate the noise"
        )
    found = label_transition(table.true_labels, table.labels, data.num_classes)
    console = Console(highlight=False)
    asked = "none" if data.noise_rate is None else f"{data.noise_rate:.4f}"
    console.print(
        f"{data.noise_kind}: requested rate {asked}, actual rate {table.noise_rate or 0:.4f} of {len(table.labels):,} labels",
        markup=False,
    )
    _print(console, found, list(data.class_names))
    if out is not None:
        data.save_labels(out, original=True)
        console.print(f"labels: {out}; --data.noise.kind file --data.noise.path {out}", markup=False, soft_wrap=True)
    if matrix is not None:
        with atomic_write(matrix) as file:
            if Path(matrix).suffix == ".npy":
                np.save(file, found.numpy())
            else:
                np.savetxt(file, found.numpy(), fmt="%.17g", delimiter=",")
        console.print(
            f"matrix: {matrix}; --data.noise.kind transition --data.noise.matrix {matrix}", markup=False, soft_wrap=True
        )
    return 0


def _print(console: Console, found: Tensor, names: list[str]) -> None:
    """Print the matrix, or the most frequent changes of many classes."""
    if len(names) <= SHOWN:
        table = Table(title="Given label (columns) by true class (rows), %", box=SIMPLE, padding=(0, 0, 0, 1))
        table.add_column("", no_wrap=True)
        for label in range(len(names)):
            table.add_column(str(label), justify="right")
        for label, row in enumerate(found.tolist()):
            table.add_row(f"{label} {names[label]}".replace("[", "\\["), *(_percent(value) for value in row))
        console.print(table)
        return
    off = found.clone().fill_diagonal_(0)
    for place in off.flatten().argsort(descending=True)[:SHOWN].tolist():
        true, given = divmod(place, len(names))
        if off[true, given] > 0:
            console.print(f"{_percent(float(off[true, given])):>6} %  {names[true]} -> {names[given]}", markup=False)
    console.print(f"the {SHOWN} most frequent changes; --matrix FILE.csv writes all", markup=False)


def _percent(value: float) -> str:
    return "" if value == 0 else f"{100 * value:.1f}" if not math.isclose(value, 1) else "100"


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm noise``, run it and return the exit status."""
    parser = CommandParser(prog="sanm noise", description="Report label noise, and write the labels to a file.")
    parser.add_function_arguments(noise, skip={"data"}, sub_configs=True)
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True, help="data module with its noise")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise, if the data module has none")
    parsed = parser.parse_args(words)
    options = parsed.data.get("init_args") or {}
    if "seed" in options and options["seed"] is None:  # as in a fit with this --seed_everything
        options["seed"] = parsed.seed
    made = parser.instantiate_classes(parsed).as_dict()
    return noise(**{key: value for key, value in made.items() if key not in ("config", "seed")})
