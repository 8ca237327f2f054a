"""Read the labels of a training set from a file, without unpickling."""

import csv
import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

_reconstruct = np.ndarray.__reduce__(np.zeros(1))[0]
"""Numpy's function that restores arrays; its module is private."""

__all__ = ["read_arrays", "read_labels"]


def read_labels(path: str | Path, num_samples: int, num_classes: int, key: str | None = None) -> Tensor:
    """Read labels from a file, in the order of the training set, without unpickling.

    Five formats are supported, by file extension:

    - ``.npy``: one array of shape (N,);
    - ``.npz``: the array named ``key``, which is optional for files with a single array;
    - ``.csv``: one column of labels, with or without a header; or two columns, position and label, with rows in any
      order; or any number of columns with a header, where ``key`` is the name of the label column and an optional
      column ``index`` contains the positions;
    - ``.json``: a list of N labels, such as the noise file of DivideMix; or an object of lists, where ``key`` is the
      name of one;
    - ``.pt``: a dictionary of numpy arrays, tensors or lists written with ``torch.save``, such as that of CIFAR-N, where
      ``key`` is the name of one.

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
    readers = {".npy": _read_npy, ".npz": _read_npz, ".csv": _read_csv, ".json": _read_json, ".pt": _read_pt}
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
        array: np.ndarray[Any, Any] = arrays[_chosen(path, list(arrays.files), key)]
        return array


def _chosen(path: Path, names: list[str], key: str | None) -> str:
    """Return the name of the array to read: the key, or the only array."""
    if key is None and len(names) != 1:
        raise ClearError(
            f"expected one array or a key for the label file {str(path)!r}, got arrays {names}; set key to one of them"
        )
    name = names[0] if key is None else key
    if name not in names:
        raise ClearError(
            f"expected an array {key!r} in the label file {str(path)!r}, got arrays {names}; set key to one of them"
        )
    return name


def _read_json(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    held = json.loads(path.read_text(encoding="utf-8-sig"))
    return np.asarray(held[_chosen(path, list(held), key)] if isinstance(held, dict) else held)


def _read_pt(path: Path, key: str | None) -> np.ndarray[Any, Any]:
    held = read_arrays(path)
    return held[_chosen(path, list(held), key)]


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read a dictionary of arrays written with ``torch.save``, without executing pickled code.

    Args:
        path: path of the file.

    Raises:
        ValueError: if the file contains anything but a dictionary of numpy arrays, tensors and lists of numbers.
    """
    safe: list[Any] = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQfd"}]
    # numpy 1 and 2 pickle arrays under different module names
    safe += [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(safe):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ClearError(
            f"expected arrays of numbers in the label file {str(path)!r}, got a file that contains other objects, none of "
            "which was loaded; save it as .npz"
        ) from error
    if not isinstance(held, dict):
        raise ClearError(
            f"expected a dictionary of arrays in the label file {str(path)!r}, got {type(held).__name__}; save it as .npz"
        )
    return {str(name): np.asarray(values) for name, values in held.items()}


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
