"""Label noise with a given transition matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sanm_lightning.data.noise_functions import check_labels

__all__ = ["check_matrix", "read_matrix", "transition"]


def transition(labels: Tensor, matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Apply noise with a transition matrix: of the n samples of class i, about ``n * matrix[i, j]`` get label j.

    The numbers are rounded to whole samples by the largest remainder, so that the fractions are as close to the matrix as
    possible; the samples are random. Released codes sample each label independently.

    Args:
        labels: shape (N,), int64, in [0, C).
        matrix: probability of label j for class i, shape (C, C), rows sum to 1.
        generator: random generator.

    Returns:
        Noisy labels, shape (N,), int64.

    Raises:
        ValueError: if labels or matrix are invalid.
    """
    check_matrix(matrix)
    num_classes = len(matrix)
    check_labels(labels, num_classes, "labels")
    noisy = labels.clone()
    for label in range(num_classes):
        members = (labels == label).nonzero()[:, 0]
        exact = matrix[label].double() / matrix[label].double().sum() * len(members)
        counts = exact.floor().long()
        order = (exact - counts).argsort(descending=True, stable=True)
        counts[order[: len(members) - int(counts.sum())]] += 1
        shuffled = members[
            torch.randperm(len(members), generator=generator, device=generator.device).to(members.device)
        ]
        noisy[shuffled] = torch.arange(num_classes).repeat_interleave(counts).to(labels.device)
    return noisy


def check_matrix(matrix: Tensor, num_classes: int | None = None) -> None:
    """Raise ValueError unless the matrix is (C, C) with rows of probabilities."""
    size = len(matrix) if num_classes is None else num_classes
    if matrix.ndim != 2 or tuple(matrix.shape) != (size, size):
        raise ValueError(
            f"expected a transition matrix ({size}, {size}), one row per class, got {tuple(matrix.shape)}; use one row and "
            "one column per class"
        )
    wrong = ((matrix < 0).any(1) | ~((matrix.double().sum(1) - 1).abs() <= 1e-3)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"expected rows of probabilities in the transition matrix, got {len(wrong)} others (first: row {wrong[0]}, "
            f"{[round(value, 4) for value in matrix[wrong[0]].tolist()][:10]}); make each row sum to 1"
        )


def read_matrix(matrix: Sequence[Sequence[float]] | str, num_classes: int) -> Tensor:
    """Return a transition matrix (C, C), float64, given as rows or as a ``.npy`` or ``.csv`` file.

    Args:
        matrix: rows of numbers, or a path.
        num_classes: C.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, or is not a transition matrix of C classes.
    """
    if isinstance(matrix, str):
        path = Path(matrix)
        if path.suffix not in (".npy", ".csv"):
            raise ValueError(f"expected a transition matrix in a .npy or .csv file, got {matrix!r}; convert the file")
        if not path.is_file():
            raise FileNotFoundError(f"expected a transition matrix in {matrix!r}, got no such file; check noise.matrix")
        try:
            read = (
                np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=2)
            )
            values = torch.from_numpy(np.asarray(read, dtype=np.float64))
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).split(".")[0].split("\n")[0]
            raise ValueError(
                f"expected a table of numbers in {matrix!r}, got a file that cannot be read ({reason}); write one row per "
                "class, without a header"
            ) from error
    else:
        if len({len(row) for row in matrix}) != 1:
            raise ValueError(
                f"expected a transition matrix ({num_classes}, {num_classes}), one row per class, got rows of different "
                "lengths; use one row and one column per class"
            )
        values = torch.tensor(matrix, dtype=torch.float64)
    check_matrix(values, num_classes)
    return values
