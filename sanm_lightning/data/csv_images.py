"""Image files listed with their labels in a CSV table."""

import csv
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from sanm_lightning.data.image_files import SPLIT_NAMES, SPLITS
from sanm_lightning.data.image_folder import ImageFiles
from sanm_lightning.data.source import Source

__all__ = ["CSVImages"]


class _Row(NamedTuple):
    path: str
    label: str
    split: str


class CSVImages(ImageFiles):
    """Images whose paths and labels are columns of a CSV file with a header; one row per image.

    Classes are the distinct labels of the training rows: whole numbers are sorted as numbers, other labels as text. The
    class index is the position in this order; ``class_names`` contains the labels. Labels of training and validation
    rows may be wrong; those of test rows are assumed correct. Images are read as in `ImageFolder`.

    Args:
        file: the CSV file, UTF-8, separated by commas, or a ``.tsv`` file, separated by tabs.
        path_column: name of the column of paths.
        label_column: name of the column of labels, text or numbers.
        split_column: name of the column with the splits ``train``, ``val`` (or ``valid``, ``validation``) and ``test``,
            case-insensitive. Default: all rows are training rows. Without test and validation rows, a fraction of the
            training rows is held out (``holdout_fraction``).
        root: folder that paths are relative to. Default: the folder of the file. With a root, absolute paths raise an
            error.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1; on access, if columns or rows are missing, or rows have no path, no
            label, an unknown split, or the path of another row.
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
        self._rows: dict[str, list[_Row]] | None = None
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The labels of the training rows, or of all rows if there are no training rows."""
        if self._class_names is None:
            rows = self._splits()
            labels = {row.label for row in rows.get("train") or [row for part in rows.values() for row in part]}
            whole = all(re.fullmatch(r"[+-]?\d+", label) for label in labels)
            self._class_names = sorted(labels, key=(lambda label: (int(label), label)) if whole else None)
        return list(self._class_names)

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``, if the file has rows of these splits."""
        return tuple(split for split in ("val", "test") if split in self._splits())

    def source(self, split: str) -> Source:
        """List the files of ``train``, ``val`` or ``test``."""
        rows = self._splits().get(split, [])
        if not rows:
            raise ValueError(f"expected rows of the {split} split in {self.file!r}, got none; add rows")
        label_of = {name: label for label, name in enumerate(self.class_names)}
        other = [row for row in rows if row.label not in label_of]
        if other:
            raise ValueError(
                f"expected labels of the {split} rows of {self.file!r} among the {len(label_of)} labels of the training "
                f"rows, got {len(other)} others (first: {other[0].label!r} of {other[0].path!r}); correct or remove "
                "these rows"
            )
        files = [Path(self.root) / row.path for row in rows]
        return self._made(split, files, [label_of[row.label] for row in rows], [row.path for row in rows])

    def _splits(self) -> dict[str, list[_Row]]:
        """Return the rows of each split that is not empty."""
        if self._rows is None:
            rows = self._checked(self._read())
            self._rows = {split: part for split in SPLITS if (part := [row for row in rows if row.split == split])}
        return self._rows

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
                f"expected a CSV file of UTF-8 text in {self.file!r}, got an invalid one ({error}); convert it"
            ) from error
        header = [cell.strip() for cell in table[0]] if table else []
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

    def _checked(self, rows: list[_Row]) -> list[_Row]:
        """Check the rows and return them with normalized split names."""
        number = range(1, len(rows) + 1)
        self._refuse("a path in every row", [f"row {n}" for n, row in zip(number, rows, strict=True) if not row.path])
        self._refuse(
            f"a label in every row, in the column {self.label_column!r}", [row.path for row in rows if not row.label]
        )
        strange = [row.split for row in rows if row.split.lower() not in SPLIT_NAMES]
        if strange:
            kinds = ", ".join(map(repr, dict.fromkeys(strange)))
            raise ValueError(
                f"expected train, val or test in the column {self.split_column!r} of {self.file!r}, got {kinds} in "
                f"{len(strange)} rows; rename them, or omit split_column"
            )
        if self._root_is_given:
            self._refuse(
                "paths that are relative to the root", [row.path for row in rows if Path(row.path).is_absolute()],
                "absolute ones", "omit root, or use relative paths",
            )  # fmt: skip
        twice = [path for path, count in Counter(row.path for row in rows).items() if count > 1]
        self._refuse("one row per image", twice, "repeated ones", "keep one row per path")
        missing = [row.path for row in rows if not (Path(self.root) / row.path).is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected files for the {len(rows)} images listed in {self.file!r}, got {len(missing)} missing files "
                f"(first: {missing[0]!r} in {self.root!r}); check --data.root and the column {self.path_column!r}"
            )
        return [row._replace(split=SPLIT_NAMES[row.split.lower()]) for row in rows]

    def _refuse(self, what: str, bad: list[str], got: str = "without", advice: str = "correct these rows") -> None:
        if bad:
            raise ValueError(f"expected {what} of {self.file!r}, got {len(bad)} {got} (first: {bad[0]!r}); {advice}")


def _normal(path: str) -> str:
    return posixpath.normpath(path) if path.strip() else ""
