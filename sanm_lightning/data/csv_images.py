"""Image files listed with their labels in a CSV table."""

import csv
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from sanm_lightning.csv_tables import other_separator
from sanm_lightning.data.image_files import SPLIT_NAMES, SPLITS
from sanm_lightning.data.image_folder import Fault, Listing, ScannedFiles

__all__ = ["CSVImages"]

SHOWN = 5
"""Number of unknown splits in an error message."""

MANY = 100
"""Number of training rows from which labels of one image each raise a warning: the column may be an index."""


class _Row(NamedTuple):
    path: str
    label: str
    split: str


class _Rule(NamedTuple):
    """What is refused in a row: its name, the test, and the error for the paths of all such rows."""

    reason: str
    wrong: Callable[[_Row], bool]
    error: Callable[[list[str]], ValueError | OSError]


class CSVImages(ScannedFiles):
    """Images whose paths and labels are columns of a CSV file with a header; one row per image.

    Classes are the distinct labels of the training rows: whole numbers are sorted as numbers, other labels as text. The
    class index is the position in this order; ``class_names`` contains the labels. Labels of training and validation
    rows may be wrong; those of test rows are assumed correct. Images are read as in `ImageFolder`.

    Args:
        file: the CSV file, UTF-8, separated by commas, or a ``.tsv`` file, separated by tabs.
        path_column: name of the column of paths.
        label_column: name of the column of labels, text or numbers.
        split_column: name of the column with the splits ``train`` (or ``training``), ``val`` (or ``valid``,
            ``validation``) and ``test`` (or ``testing``), case-insensitive. Default: all rows are training rows. Without
            test and validation rows, a fraction of the training rows is held out (``holdout_fraction``).
        root: folder that paths are relative to. Default: the folder of the file. With a root, absolute paths and paths
            that leave it raise an error.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `ImageFiles`, `SquareImages` and `NoisyDataModule`.

    Warns if most labels of a table of 100 or more training rows belong to one image each: another column was probably meant.

    Raises:
        ValueError: if image_size is smaller than 1; on access, if columns or rows are missing, rows have no path, no
            label, an unknown split, the path of another row, or a label that is not among those of the training rows, or
            if there is only one class.
        FileNotFoundError: on access, if the file or listed images do not exist.
    """

    def __init__(
        self,
        file: str = "images.csv",
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = None,
        root: str | None = None,
        image_size: int = 224,
        decode_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        folder = str(Path(file).parent) if root is None else root
        super().__init__(root=folder, image_size=image_size, decode_size=decode_size, **kwargs)
        self.file = file
        self.path_column, self.label_column, self.split_column = path_column, label_column, split_column
        self._root_is_given = root is not None
        self._table: tuple[dict[str, list[_Row]], list[Fault]] | None = None
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The labels of the training rows, or of all rows if there are no training rows."""
        for fault in self._rows()[1]:
            if not self.left_out(fault):
                raise fault.error
        return self._names()

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``, if the file has rows of these splits."""
        return tuple(split for split in ("val", "test") if split in self._rows()[0])

    def listing(self, split: str) -> Listing:
        """List the files of ``train``, ``val`` or ``test``; faults of the file are listed with the training rows."""
        splits, faults = self._rows()
        rows = splits.get(split, [])
        faults = list(faults) if split == "train" else []
        if not rows:
            fault = ValueError(f"expected rows of the {split} split in {self.file!r}, got none; add rows")
            faults.append(Fault(self.file, f"no rows of the {split} split", fault))
        names = self._names()
        label_of = {name: label for label, name in enumerate(names)}
        other = [row for row in rows if row.label not in label_of]
        if other:
            unknown = ValueError(
                f"expected labels of the {split} rows of {self.file!r} among the {len(label_of)} labels of the training "
                f"rows, got {len(other)} others (first: {other[0].label!r} of {other[0].path!r}); correct or remove "
                "these rows"
            )
            faults += [Fault(row.path, f"label {row.label!r} unknown in training", unknown) for row in other]
        rows = [row for row in rows if row.label in label_of]
        files = [Path(self.root) / row.path for row in rows]
        return Listing(files, [label_of[row.label] for row in rows], names, [row.path for row in rows], {}, faults)

    def _names(self) -> list[str]:
        if self._class_names is None:
            splits = self._rows()[0]
            rows = splits.get("train") or [row for part in splits.values() for row in part]
            labels = Counter(row.label for row in rows)
            if len(rows) >= MANY and 2 * (single := list(labels.values()).count(1)) > len(labels):
                rank_zero_warn(
                    f"expected several images of most classes, got one image for {single} of the {len(labels)} labels in the "
                    f"column {self.label_column!r} of {self.file!r}; check label_column"
                )
            whole = all(re.fullmatch(r"[+-]?\d+", label) for label in labels)
            self._class_names = sorted(labels, key=(lambda label: (int(label), label)) if whole else None)
        return list(self._class_names)

    def _rows(self) -> tuple[dict[str, list[_Row]], list[Fault]]:
        """Return the rows without faults of each split that is not empty, and the faults of the others."""
        if self._table is None:
            rows, faults = self._checked(self._read())
            splits = {split: part for split in SPLITS if (part := [row for row in rows if row.split == split])}
            self._table = splits, faults
        return self._table

    def _read(self) -> list[_Row]:
        path = Path(self.file)
        if not path.is_file():
            raise FileNotFoundError(f"expected a CSV file in {self.file!r}, got none; check --data.file")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                separator = "\t" if path.suffix.lower() == ".tsv" else ","
                table = [row for row in csv.reader(file, delimiter=separator) if any(cell.strip() for cell in row)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(
                f"expected a CSV file of UTF-8 text in {self.file!r}, got an invalid one ({error}); save it as UTF-8"
            ) from error
        header = [cell.strip() for cell in table[0]] if table else []
        if separator == "," and (separated := other_separator(path, header)):
            raise ValueError(separated)
        wanted = [self.path_column, self.label_column, *([] if self.split_column is None else [self.split_column])]
        missing = [name for name in wanted if name not in header]
        if missing:
            raise ValueError(
                f"expected the columns {', '.join(wanted)} in {self.file!r}, got {', '.join(header) or 'an empty file'} "
                f"without {', '.join(missing)}; set path_column, label_column and split_column"
            )
        if len(table) == 1:
            raise ValueError(f"expected rows in {self.file!r}, got only a header; add one row per image")
        uneven = [(number, row) for number, row in enumerate(table[1:], 1) if len(row) != len(header)]
        if uneven:
            raise ValueError(
                f"expected {len(header)} columns in every row of {self.file!r}, got {len(uneven)} other rows (first: row "
                f"{uneven[0][0]} with {len(uneven[0][1])}); quote cells that contain a comma"
            )
        columns = [header.index(name) for name in wanted]
        rows = [[row[column] for column in columns] for row in table[1:]]
        return [_Row(_normal(row[0]), row[1].strip(), row[2].strip() if len(row) > 2 else "train") for row in rows]

    def _checked(self, rows: list[_Row]) -> tuple[list[_Row], list[Fault]]:
        """Return the rows without faults, with normalized split names, and the faults."""
        faults: list[Fault] = []
        place = {id(row): f"row {number}" for number, row in enumerate(rows, 1)}
        for reason, wrong, error in self._rules(rows):
            names = [row.path or place[id(row)] for row in rows if wrong(row)]
            if names:
                raised = error(names)
                faults += [Fault(name, reason, raised) for name in names]
                rows = [row for row in rows if not wrong(row)]
        return [row._replace(split=SPLIT_NAMES[row.split.lower()]) for row in rows], faults

    def _rules(self, rows: list[_Row]) -> list[_Rule]:
        """Return what is refused, in order."""
        repeated = {path for path, count in Counter(row.path for row in rows).items() if count > 1}
        first = {row.path: id(row) for row in reversed(rows) if row.path in repeated}
        relative, inside = "paths that are relative to the root", "paths inside of the root"
        return [
            _Rule("no path", lambda row: not row.path, self._error("a path in every row")),
            _Rule(
                "no label", lambda row: not row.label,
                self._error(f"a label in every row, in the column {self.label_column!r}"),
            ),
            _Rule("unknown split", lambda row: row.split.lower() not in SPLIT_NAMES, self._split_error(rows)),
            _Rule(
                "absolute path", lambda row: self._root_is_given and Path(row.path).is_absolute(),
                self._error(relative, "absolute ones", "omit root, or use relative paths"),
            ),
            _Rule(
                "path outside of the root", lambda row: self._root_is_given and row.path.split("/")[0] == "..",
                self._error(inside, "that leave it", "choose another root, or correct these rows"),
            ),
            _Rule(
                "repeated path", lambda row: first.get(row.path, id(row)) != id(row),
                self._error("one row per image", "repeated ones", "keep one row per path"),
            ),
            _Rule(
                "missing file", lambda row: not (Path(self.root) / row.path).is_file(),
                lambda missing: FileNotFoundError(
                    f"expected files for the {len(rows)} images listed in {self.file!r}, got {len(missing)} missing files "
                    f"(first: {missing[0]!r} in {self.root!r}); check --data.root and the column {self.path_column!r}"
                ),
            ),
        ]  # fmt: skip

    def _error(
        self, what: str, got: str = "without", advice: str = "correct these rows"
    ) -> Callable[[list[str]], ValueError]:
        return lambda bad: ValueError(
            f"expected {what} of {self.file!r}, got {len(bad)} {got} (first: {bad[0]!r}); {advice}"
        )

    def _split_error(self, rows: Iterable[_Row]) -> Callable[[list[str]], ValueError]:
        strange = list(dict.fromkeys(row.split for row in rows if row.split.lower() not in SPLIT_NAMES))
        more = f" and {len(strange) - SHOWN} more values" if len(strange) > SHOWN else ""
        return lambda bad: ValueError(
            f"expected train, val or test in the column {self.split_column!r} of {self.file!r}, got "
            f"{', '.join(map(repr, strange[:SHOWN]))}{more} in {len(bad)} rows; rename them, or omit split_column"
        )


def _normal(path: str) -> str:
    return posixpath.normpath(path) if path.strip() else ""
