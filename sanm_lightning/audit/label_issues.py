"""Table of label issues with one row per sample, and ``label_issues.csv``, sorted by increasing quality."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sanm_lightning.csv_tables import read_csv, write_csv

__all__ = ["HEADER", "LabelIssues", "read_label_issues", "write_label_issues"]

HEADER = [
    "path",
    "split",
    "given_label",
    "suggested_label",
    "quality",
    "rank",
    "p_given",
    "p_suggested",
    "neighbor_labels",
]
"""Columns of the file; ``index`` replaces ``path`` for data without files."""

_UNREADABLE = "unreadable: "
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LabelIssues:
    """Label issues of N samples, in any order.

    Args:
        paths: path of each sample relative to the root, with ``/``; None without files.
        splits: ``train``, ``val``, ``test``, or ``all`` (no split folders), N of them.
        given: given labels, shape (N,), int64, in [0, C).
        suggested: most probable labels, shape (N,), int64, in [0, C); ignored for unreadable samples.
        quality: probability that the given label is correct, shape (N,), in [0, 1]; ignored for unreadable samples.
        p_given: predicted probability of the given label, shape (N,), in [0, 1]; ignored for unreadable samples.
        p_suggested: predicted probability of the suggested label, shape (N,), in [0, 1]; ignored for unreadable
            samples.
        class_names: the C class names.
        neighbor_labels: given labels of the nearest neighbors, shape (N, k), int64, in [0, C), or -1 for none; None if
            unknown.
        unreadable: reasons by row, for samples that could not be read.
        index: position of each sample in the original set, shape (N,), int64; only for data without files.

    Raises:
        ValueError: if columns differ in length, a value is out of range, names are not unique, or not exactly one of
            paths and index is given.
    """

    paths: list[str] | None
    splits: list[str]
    given: Array
    suggested: Array
    quality: Array
    p_given: Array
    p_suggested: Array
    class_names: list[str]
    neighbor_labels: Array | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    index: Array | None = None

    def __post_init__(self) -> None:
        if (self.paths is None) == (self.index is None):
            what = "neither" if self.paths is None else "both"
            raise ValueError(f"expected paths or index of the samples, got {what}; set exactly one")
        columns = {
            "paths": self.paths, "index": self.index, "splits": self.splits, "suggested": self.suggested,
            "quality": self.quality, "p_given": self.p_given, "p_suggested": self.p_suggested,
            "neighbor_labels": self.neighbor_labels,
        }  # fmt: skip
        for name, column in columns.items():
            if column is not None and len(column) != len(self.given):
                raise ValueError(
                    f"expected {len(self.given)} {name}, as many as given, got {len(column)}; check the order"
                )
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"expected unique class names, got {self.class_names}; rename duplicates")
        if len(set(self.names)) != len(self.given):
            raise ValueError("expected each sample once, got a duplicate path or index; remove one of the rows")
        readable = self.readable
        for name, label in (("given", self.given), ("suggested", self.suggested[readable])):
            if len(label) and not (int(label.min()) >= 0 and int(label.max()) < len(self.class_names)):
                raise ValueError(
                    f"expected {name} labels in [0, {len(self.class_names)}), got {int(label.min())} to "
                    f"{int(label.max())}; add the missing class names"
                )
        for name in ("quality", "p_given", "p_suggested"):
            values = getattr(self, name)[readable]
            if not np.all((values >= 0) & (values <= 1)):  # also False for NaN
                raise ValueError(f"expected {name} in [0, 1], got other values; use probabilities")
        near = self.neighbor_labels
        if near is not None and near.size and not (int(near.min()) >= -1 and int(near.max()) < len(self.class_names)):
            raise ValueError(
                f"expected neighbor_labels in [-1, {len(self.class_names)}), got {int(near.min())} to {int(near.max())}; "
                "add the missing class names"
            )

    def __len__(self) -> int:
        return len(self.given)

    @property
    def names(self) -> list[str]:
        """Path of each sample, or its position as text."""
        return self.paths if self.paths is not None else [str(i) for i in self.index]  # type: ignore[union-attr]

    @property
    def readable(self) -> Array:
        """Whether each sample could be read, shape (N,), bool."""
        mask = np.ones(len(self.given), dtype=bool)
        mask[list(self.unreadable)] = False
        return mask

    def order(self) -> Array:
        """Return rows by increasing quality, stable, with unreadable samples last; shape (N,), int64."""
        quality = np.where(self.readable, self.quality, np.inf)
        return np.argsort(quality, kind="stable")


def write_label_issues(path: str | Path, issues: LabelIssues) -> None:
    """Write the table as CSV, by increasing quality, atomically.

    Args:
        path: output file; an existing file is replaced.
        issues: the table.

    Raises:
        OSError: if the file cannot be written.
    """
    names, classes = issues.names, issues.class_names
    quoted = [re.sub(r"([\\|])", r"\\\1", name) for name in classes]
    given, suggested = issues.given.tolist(), issues.suggested.tolist()
    numbers = [
        [f"{value:.6f}" for value in part.tolist()] for part in (issues.quality, issues.p_given, issues.p_suggested)
    ]
    quality, p_given, p_suggested = numbers
    near = issues.neighbor_labels.tolist() if issues.neighbor_labels is not None else [[]] * len(issues)

    def row(rank: int, i: int) -> list[str]:
        head = [names[i], issues.splits[i], classes[given[i]]]
        if i in issues.unreadable:
            return [*head, "", "", str(rank), "", "", _UNREADABLE + issues.unreadable[i]]
        neighbors = "|".join(quoted[label] for label in near[i] if label >= 0)
        return [*head, classes[suggested[i]], quality[i], str(rank), p_given[i], p_suggested[i], neighbors]

    header = HEADER if issues.paths is not None else ["index", *HEADER[1:]]
    write_csv(path, header, (row(rank, i) for rank, i in enumerate(issues.order().tolist(), start=1)))


def read_label_issues(path: str | Path, class_names: Sequence[str] | None = None) -> LabelIssues:
    """Read a table written by :func:`write_label_issues`, in the order of the file.

    Args:
        path: path of the file.
        class_names: the C names in the order of the data set; None uses the names in the file, sorted.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the header is different, a value is not a number or out of range, a sample is duplicated, or a
            class is not in ``class_names``.
    """
    header, rows = read_csv(path, [HEADER, ["index", *HEADER[1:]]])
    readable = [row[4] != "" for row in rows]
    near = [_split(row[8]) if known else [] for row, known in zip(rows, readable, strict=True)]
    occurring = {row[2] for row in rows} | {row[3] for row, known in zip(rows, readable, strict=True) if known}
    occurring.update(name for names in near for name in names)
    classes = sorted(occurring) if class_names is None else list(class_names)
    label = {name: i for i, name in enumerate(classes)}
    unknown = sorted(occurring - set(classes))
    if unknown:
        raise ValueError(
            f"expected classes among {len(classes)} in {str(path)!r}, got {len(unknown)} others (first: {unknown[0]!r}); "
            "use a file of this data set"
        )
    width = max(map(len, near), default=0)
    neighbors = np.full((len(rows), width), -1, dtype=np.int64)
    for i, names in enumerate(near):
        neighbors[i, : len(names)] = [label[name] for name in names]
    try:
        number = [
            np.array([float(row[column]) if known else np.nan for row, known in zip(rows, readable, strict=True)])
            for column in (4, 6, 7)
        ]
        index = np.array([int(row[0]) for row in rows], dtype=np.int64) if header[0] == "index" else None
    except ValueError as error:
        raise ValueError(f"expected numbers in {str(path)!r}, got {error}; write the file again") from error
    try:
        return LabelIssues(
            paths=[row[0] for row in rows] if index is None else None,
            splits=[row[1] for row in rows],
            given=np.array([label[row[2]] for row in rows], dtype=np.int64),
            suggested=np.array(
                [label[row[3]] if known else -1 for row, known in zip(rows, readable, strict=True)], dtype=np.int64
            ),
            quality=number[0],
            p_given=number[1],
            p_suggested=number[2],
            class_names=classes,
            neighbor_labels=neighbors if width else None,
            unreadable={i: row[8].removeprefix(_UNREADABLE) for i, row in enumerate(rows) if not readable[i]},
            index=index,
        )
    except ValueError as error:
        raise ValueError(f"expected a valid table in {str(path)!r}, got an invalid one: {error}") from error


def _split(cell: str) -> list[str]:
    """Split class names joined by ``|``, and unescape them."""
    if not cell:
        return []
    parts = re.findall(r"(?:[^\\|]|\\.)+", cell, flags=re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL) for part in parts]
