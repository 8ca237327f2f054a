"""Label files with one row per sample, identified by path or index, and samples to drop."""

import csv
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sanm_lightning.class_names import real_names
from sanm_lightning.csv_tables import other_separator
from sanm_lightning.data.label_files import ClearError, read_labels

__all__ = ["FileLabels", "read_known_labels", "read_label_file"]

LABEL_COLUMNS = ("new_label", "label", "labels")
"""Names of the label column in order of precedence, without a key."""
VERDICTS = {"1": True, "true": True, "yes": True, "drop": True, "0": False, "false": False, "no": False, "": False}
"""Values of the cells of the column ``drop``."""


class FileLabels(NamedTuple):
    """Labels from a file for a training set of N samples.

    Attributes:
        labels: class indices, shape (N,), int64; the given label for dropped samples without a label.
        kept: False for samples to drop from the training set, shape (N,), bool.
    """

    labels: Tensor
    kept: Tensor

    def compare(self, labels: Tensor) -> str:
        """Return how many labels differ from those of the data set, shape (N,), and how many samples are dropped."""
        differ = int(((self.labels != labels) & self.kept).sum())
        return f"{differ} of {len(labels)} differ from those of the data set, {int((~self.kept).sum())} left out"


class _Rows(NamedTuple):
    by_path: bool
    samples: list[str]
    labels: list[str]
    drops: list[str]


def read_label_file(
    path: str | Path,
    labels: Tensor,
    class_names: Sequence[str],
    paths: Sequence[str] | None = None,
    other_paths: Collection[str] = (),
    key: str | None = None,
) -> FileLabels:
    """Read the labels of a training set.

    A ``.csv`` file with a column ``path`` or ``index``, and a ``.npz`` file with an array ``paths`` or ``index``, has
    one row per sample, in any order. Labels are class names or, if all labels are numbers and the classes have other
    names, class indices; in a ``.npz`` file with ``class_names``, indices of these names. A column ``drop`` (1 or 0)
    drops samples from the training set. Any other file contains the labels of all samples in their order; see
    :func:`read_labels`.

    Args:
        path: path of the file.
        labels: given labels, shape (N,), int64.
        class_names: C names in the order of the class indices.
        paths: path of each sample, as in the file; None without files.
        other_paths: paths of samples of other splits, whose rows are ignored.
        key: name of the label column or array; default: the first of ``new_label``, ``label``, ``labels``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read, rows are missing, duplicated or of unknown samples, or a label is not a
            class.
    """
    path = Path(path)
    rows = None
    if path.is_file() and path.suffix in READERS:
        try:
            rows = READERS[path.suffix](path, key, paths is not None, real_names(class_names) is not None)
        except ClearError:
            raise
        except Exception as error:  # numpy and csv raise various exceptions for damaged files
            reason = str(error).split(".")[0]
            raise ValueError(
                f"expected a readable label file, got {str(path)!r}, which cannot be read ({reason}); save it again"
            ) from error
    if rows is None:
        return FileLabels(
            read_labels(path, len(labels), len(class_names), key), torch.ones(len(labels), dtype=torch.bool)
        )
    if rows.by_path and paths is None:
        raise ValueError(
            f"expected a column 'index' in {str(path)!r}, got 'path' for a data set without files; use indices"
        )
    where = _samples(path, rows, len(labels), paths, set(other_paths))
    order = torch.tensor([sample for sample in where if sample is not None])
    mine = [i for i, sample in enumerate(where) if sample is not None]
    dropped = _dropped(path, [rows.drops[i] for i in mine]) if rows.drops else [False] * len(mine)
    found = _classes(path, [rows.labels[i] for i in mine], dropped, class_names)
    new, kept = labels.clone(), torch.ones(len(labels), dtype=torch.bool)
    kept[order] = ~torch.tensor(dropped)
    values = torch.tensor([-1 if number is None else number for number in found])
    new[order] = torch.where(values < 0, labels[order], values)
    if not kept.any():
        raise ValueError(
            f"expected samples to train on in {str(path)!r}, got all {len(labels)} dropped; keep at least one"
        )
    return FileLabels(new, kept)


def read_known_labels(
    path: str | Path, size: int, class_names: Sequence[str], paths: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Read the labels of some samples of a training set, one row per sample, in the formats of :func:`read_label_file`.

    Args:
        path: path of a ``.csv`` file with a column ``path`` or ``index``, or of a ``.npz`` file with such an array.
        size: N, number of samples of the training set.
        class_names: C names in the order of the class indices.
        paths: path of each sample, as in the file; None without files.

    Returns:
        Positions of the samples, shape (P,), and their labels, shape (P,), both int64.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read or is empty, rows are duplicated or of unknown samples, or a label is not a
            class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of known labels in {str(path)!r}, got no such file; check the path")
    rows = None
    if path.suffix in READERS:
        try:
            rows = READERS[path.suffix](path, None, paths is not None, real_names(class_names) is not None)
        except ClearError:
            raise
        except Exception as error:  # numpy and csv raise various exceptions for damaged files
            reason = str(error).split(".")[0]
            raise ValueError(
                f"expected a readable file of known labels, got {str(path)!r}, which cannot be read ({reason}); save it again"
            ) from error
    if rows is None or not rows.samples or (rows.by_path and paths is None):
        got = "none" if rows is None else "no rows" if not rows.samples else "'path' for a data set without files"
        raise ValueError(
            f"expected known labels in rows of a column 'index' or 'path' and a column 'label' in {str(path)!r}, got {got}; "
            "write a .csv file with these columns"
        )
    where = _samples(path, rows, size, paths, set(), every=False)
    labels = _classes(path, rows.labels, [False] * len(where), class_names)
    return torch.tensor(where, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)


def _csv_rows(path: Path, key: str | None, files: bool, named: bool) -> _Rows | None:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        table = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    header = [cell.strip() for cell in table[0]] if table else []
    if separated := other_separator(path, header):
        raise ClearError(separated)
    by_path = "path" in header and (files or "index" not in header)
    if (not by_path and "index" not in header) or key in ("path", "index"):
        return None
    bad = next((number for number, row in enumerate(table) if len(row) != len(header)), None)
    if bad is not None:
        raise ClearError(
            f"expected {len(header)} columns in {str(path)!r}, got {len(table[bad])} in row {bad}; correct it"
        )
    sample = "path" if by_path else "index"
    others = [name for name in header if name not in (sample, "drop")]
    column = header.index(_label_name(path, header, others, key))
    rows = table[1:]
    drops = [row[header.index("drop")] for row in rows] if "drop" in header else []
    return _Rows(by_path, [row[header.index(sample)] for row in rows], [row[column] for row in rows], drops)


def _npz_rows(path: Path, key: str | None, files: bool, named: bool) -> _Rows | None:
    with np.load(path, allow_pickle=False) as arrays:
        names = list(arrays.files)
        by_path = "paths" in names and (files or "index" not in names)
        if not by_path and "index" not in names:
            return None
        sample = "paths" if by_path else "index"
        label = _label_name(path, names, [], key)
        values, samples = arrays[label], arrays[sample]
        drops = arrays["drop"].astype(int).astype(str).tolist() if "drop" in names else []
        if label == "labels" and "other_labels" in names:  # samples that were not in the training split of a run
            drops = [*(drops or ["0"] * len(values)), *arrays["other_dropped"].astype(int).astype(str).tolist()]
            values = np.concatenate([values, arrays["other_labels"]])
            samples = np.concatenate([samples, arrays[f"other_{sample}"]])
        own = arrays["class_names"].tolist() if "class_names" in names else []
    sizes = {len(samples), len(values), len(drops) or len(samples)}
    if values.ndim != 1 or len(sizes) > 1:
        raise ClearError(f"expected one label per entry of {sample!r} in {str(path)!r}, got {values.shape}; correct it")
    if values.dtype.kind in "iuf" and np.array_equal(values, values.round()):
        values = values.astype(np.int64)
        if named and real_names(own) and len(values) and values.min() >= 0 and values.max() < len(own):
            values = np.array(own)[values]
    return _Rows(by_path, samples.astype(str).tolist(), values.astype(str).tolist(), drops)


READERS = {".csv": _csv_rows, ".npz": _npz_rows}


def _label_name(path: Path, names: list[str], others: list[str], key: str | None) -> str:
    """Return the name of the label column: the key, a default name, or the only other column."""
    if key is None:
        usual = [name for name in LABEL_COLUMNS if name in names]
        candidates = usual[:1] or (others if len(others) == 1 else [])
    else:
        candidates = [key] if key in names else []
    if not candidates:
        wanted = f"one of {', '.join(LABEL_COLUMNS)}" if key is None else repr(key)
        raise ClearError(
            f"expected labels under {wanted} in {str(path)!r}, got {', '.join(names)}; set the key of the noise to one of them"
        )
    return candidates[0]


def _forms(cell: str) -> tuple[str, ...]:
    """Return the variants of a cell: unchanged, without the spreadsheet escape, stripped, and as a whole number."""
    guarded = cell[1:] if re.match(r"'+[=+\-@\t\r]", cell) else cell
    bare = cell.strip()
    return cell, guarded, bare, bare.removesuffix(".0") if re.fullmatch(r"\d+\.0", bare) else bare


def _look_up(cell: str, known: Mapping[str, int]) -> int | None:
    return next((known[form] for form in _forms(cell) if form in known), None)


def _samples(
    path: Path, rows: _Rows, size: int, paths: Sequence[str] | None, others: set[str], every: bool = True
) -> list[int | None]:
    """Return the position of the sample of each row; None for rows of other splits. ``every`` requires all samples."""
    names = [str(number) for number in range(size)] if not rows.by_path or paths is None else paths
    known = {name: number for number, name in enumerate(names)}
    where: list[int | None] = []
    unknown, twice, seen = [], [], set()
    for cell in rows.samples:
        number = _look_up(cell, known)
        if number is None and rows.by_path:
            number = known.get(posixpath.normpath(cell))
        if number is None:
            if not any(form in others for form in _forms(cell)):
                unknown.append(cell)
        elif number in seen:
            twice.append(cell)
        else:
            seen.add(number)
        where.append(number)
    missing = [name for name in names if known[name] not in seen] if every else []
    kinds = ((missing, "samples without a row"), (unknown, "rows of unknown samples"), (twice, "repeated rows"))
    faults = [f"{len(cells)} {kind} (first: {cells[0]!r})" for cells, kind in kinds if cells]
    if faults:
        whole = "each" if every else "some"
        remedy = "use a label file of this data set, with the root that it was made for"
        raise ValueError(
            f"expected one row for {whole} of the {size} training samples in {str(path)!r}, got {' and '.join(faults)}; "
            f"{remedy if missing or unknown else 'keep one row per sample'}"
        )
    return where


def _dropped(path: Path, cells: list[str]) -> list[bool]:
    bad = [cell for cell in cells if cell.strip().lower() not in VERDICTS]
    if bad:
        raise ValueError(
            f"expected 0 or 1 in the column 'drop' of {str(path)!r}, got {len(bad)} others, such as {bad[0]!r}; correct "
            "them"
        )
    return [VERDICTS[cell.strip().lower()] for cell in cells]


def _classes(path: Path, cells: list[str], dropped: list[bool], class_names: Sequence[str]) -> list[int | None]:
    """Return the class index of each row; None for dropped rows without a class."""
    tables = [{name: number for number, name in enumerate(class_names)}]
    if not all(re.fullmatch(r"[+-]?\d+", name) for name in class_names):  # numeric names are not interpreted as indices
        tables.append({str(number): number for number in range(len(class_names))})
    found: list[int | None] = []
    bad: list[list[str]] = []
    for known in tables:
        found = [_look_up(cell, known) for cell in cells]
        bad.append(
            [cell for cell, number, drop in zip(cells, found, dropped, strict=True) if number is None and not drop]
        )
        if not bad[-1]:
            return found
    unknown = min(bad, key=len)
    examples = ", ".join(map(repr, list(dict.fromkeys(unknown))[:3]))
    some = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
    raise ValueError(
        f"expected labels among the {len(class_names)} classes ({some}) in {str(path)!r}, got {len(unknown)} others, "
        f"such as {examples}; correct them, or drop the rows"
    )
