"""Labels of a training set from a file; nothing in the file is unpickled."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_labels"]


def read_labels(path: str | Path, num_samples: int, num_classes: int, key: str | None = None) -> Tensor:
    """Labels of a training set from a file, in the order of the set. Nothing in the file is ever unpickled.

    Three formats, by the ending of the name:

    - ``.npy``: one array of shape (N,);
    - ``.npz``: the array called ``key``; where the file holds a single array, the key may be left out;
    - ``.csv``: one column of labels, with or without a header; or two columns, position and label, rows in any order;
      or any number of columns under a header, ``key`` being the name of the label column (a column called ``index``, if
      there is one, then gives the positions).

    Args:
        path: the file.
        num_samples: N, the labels expected.
        num_classes: C; labels lie in [0, C).
        key: name of the array or column.

    Returns:
        Labels, shape (N,), int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or does not hold N whole numbers in [0, C).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The label file {path} does not exist: check the path of the noise.")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(f"The label file {path} must end in {sorted(readers)}, got {path.suffix!r}: convert it.")
    try:
        values = readers[path.suffix](path, key)
    except _ClearError:
        raise
    except Exception as error:  # numpy and csv fail in many ways on a damaged file
        reason = str(error).split(".")[0]
        raise ValueError(f"The label file {path} cannot be read ({reason}): save it as plain numbers.") from error
    return _as_labels(path, values, num_samples, num_classes)


class _ClearError(ValueError):
    """A sentence meant for the user, not to be wrapped again."""


def _read_npy(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    return array


def _read_npz(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays.files)
        if key is None and len(names) != 1:
            raise _ClearError(f"The label file {path} holds the arrays {names}: name one of them as the key.")
        name = names[0] if key is None else key
        if name not in names:
            raise _ClearError(f"The label file {path} has no array {key!r}, only {names}: name one of them as the key.")
        array: np.ndarray[Any, Any] = arrays[name]
        return array


def _read_csv(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    header = rows.pop(0) if rows and not all(_is_number(cell) for cell in rows[0]) else None
    if header is None and key is not None:
        raise _ClearError(f"The label file {path} has no header line, so no column {key!r}: leave out the key.")
    width = len(header) if header is not None else len(rows[0]) if rows else 1
    uneven = next((i for i, row in enumerate(rows) if len(row) != width), None)
    if uneven is not None:
        raise _ClearError(
            f"The label file {path} has {width} columns, but {len(rows[uneven])} in row {uneven}: mend it."
        )
    position = None
    if key is not None and header is not None:
        if key not in header:
            raise _ClearError(f"The label file {path} has no column {key!r}, only {header}: name one as the key.")
        column = header.index(key)
        position = header.index("index") if "index" in header and key != "index" else None
    elif width == 1:
        column = 0
    elif width == 2:
        position, column = 0, 1
    else:
        raise _ClearError(f"The label file {path} has {width} columns {header or ''}: give the label column as key.")
    bad = next((row[column] for row in rows if not _is_number(row[column])), None)
    if bad is not None:
        raise _ClearError(f"The label file {path} holds {bad!r} where a label is expected: write class indices.")
    labels = np.array([float(row[column]) for row in rows])
    if position is None:
        return labels
    places = np.array([float(row[position]) if _is_number(row[position]) else np.nan for row in rows])
    if not np.array_equal(np.sort(places), np.arange(len(rows))):
        raise _ClearError(
            f"The positions in the label file {path} must be 0 to {len(rows) - 1}, each once, but they are not: give "
            "every sample one row."
        )
    return labels[np.argsort(places)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _as_labels(path: Path, values: np.ndarray[Any, Any], num_samples: int, num_classes: int) -> Tensor:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (num_samples,):
        raise ValueError(
            f"The label file {path} must hold {num_samples} labels, one per training image in the order of the set, "
            f"got shape {values.shape}: check that it belongs to this data set."
        )
    if values.dtype.kind not in "iuf" or not np.all(np.isfinite(values)) or not np.array_equal(values, values.round()):
        raise ValueError(
            f"The label file {path} must hold whole numbers, got others, of type {values.dtype}: save class indices."
        )
    if len(values) and (values.min() < 0 or values.max() >= num_classes):
        raise ValueError(
            f"The labels in {path} must lie in 0 to {num_classes - 1}, got {int(values.min())} to {int(values.max())}: "
            "check that the file belongs to this data set."
        )
    return torch.from_numpy(values.astype(np.int64))
