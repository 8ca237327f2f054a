"""Read the labels of a training set from a file, without unpickling."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_labels"]


def read_labels(path: str | Path, num_samples: int, num_classes: int, key: str | None = None) -> Tensor:
    """Read labels from a file, in the order of the training set, without unpickling.

    Three formats are supported, by file extension:

    - ``.npy``: one array of shape (N,);
    - ``.npz``: the array named ``key``, which is optional for files with a single array;
    - ``.csv``: one column of labels, with or without a header; or two columns, position and label, with rows in any
      order; or any number of columns with a header, where ``key`` is the name of the label column and an optional
      column ``index`` contains the positions.

    Args:
        path: path of the file.
        num_samples: N, number of labels.
        num_classes: C, number of classes; labels are in [0, C).
        key: name of the array or column.

    Returns:
        Labels, shape (N,), int64.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read, or does not contain N whole numbers in [0, C).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a label file in {str(path)!r}, got no such file; check the path of the noise"
        )
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv}
    if path.suffix not in readers:
        raise ValueError(
            f"expected a label file with extension {', '.join(sorted(readers))}, got {str(path)!r}; convert the file"
        )
    try:
        values = readers[path.suffix](path, key)
    except ClearError:
        raise
    except Exception as error:  # numpy and csv raise various exceptions for damaged files
        reason = str(error).split(".")[0]
        raise ValueError(
            f"expected a readable label file, got {str(path)!r}, which cannot be read ({reason}); save it as plain "
            "numbers"
        ) from error
    return _as_labels(path, values, num_samples, num_classes)


class ClearError(ValueError):
    """Error with a complete message, which is raised unchanged."""


def _read_npy(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    return array


def _read_npz(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays.files)
        if key is None and len(names) != 1:
            raise ClearError(
                f"expected one array or a key for the label file {str(path)!r}, got arrays {names}; set key to one of "
                "them"
            )
        name = names[0] if key is None else key
        if name not in names:
            raise ClearError(
                f"expected an array {key!r} in the label file {str(path)!r}, got arrays {names}; set key to one of them"
            )
        array: np.ndarray[Any, Any] = arrays[name]
        return array


def _read_csv(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    header = rows.pop(0) if rows and not all(_is_number(cell) for cell in rows[0]) else None
    if header is None and key is not None:
        raise ClearError(
            f"expected a header with column {key!r} in the label file {str(path)!r}, got no header; omit the key"
        )
    width = len(header) if header is not None else len(rows[0]) if rows else 1
    uneven = next((i for i, row in enumerate(rows) if len(row) != width), None)
    if uneven is not None:
        raise ClearError(
            f"expected {width} columns in every row of the label file {str(path)!r}, got {len(rows[uneven])} in row "
            f"{uneven}; correct the file"
        )
    position = None
    if key is not None and header is not None:
        if key not in header:
            raise ClearError(
                f"expected a column {key!r} in the label file {str(path)!r}, got columns {header}; set key to one of "
                "them"
            )
        column = header.index(key)
        position = header.index("index") if "index" in header and key != "index" else None
    elif width == 1:
        column = 0
    elif width == 2:
        position, column = 0, 1
    else:
        raise ClearError(
            f"expected 1 or 2 columns or a key for the label file {str(path)!r}, got {width} columns {header or ''}; "
            "set key to the name of the label column"
        )
    bad = next((row[column] for row in rows if not _is_number(row[column])), None)
    if bad is not None:
        raise ClearError(f"expected numeric labels in the label file {str(path)!r}, got {bad!r}; use class indices")
    labels = np.array([float(row[column]) for row in rows])
    if position is None:
        return labels
    places = np.array([float(row[position]) if _is_number(row[position]) else np.nan for row in rows])
    if not np.array_equal(np.sort(places), np.arange(len(rows))):
        raise ClearError(
            f"expected positions 0 to {len(rows) - 1}, each once, in the label file {str(path)!r}, got missing, "
            "repeated or other positions; write one row per sample"
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
            f"expected {num_samples} labels in the label file {str(path)!r}, one per training image in the order of "
            f"the set, got shape {values.shape}; check that the file belongs to this data set"
        )
    if values.dtype.kind not in "iuf" or not np.all(np.isfinite(values)) or not np.array_equal(values, values.round()):
        raise ValueError(
            f"expected whole numbers in the label file {str(path)!r}, got other values of type {values.dtype}; use "
            "class indices"
        )
    if len(values) and (values.min() < 0 or values.max() >= num_classes):
        raise ValueError(
            f"expected labels in 0 to {num_classes - 1} in the label file {str(path)!r}, got {int(values.min())} to "
            f"{int(values.max())}; check that the file belongs to this data set"
        )
    return torch.from_numpy(values.astype(np.int64))
