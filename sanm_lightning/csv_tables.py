"""CSV files in which cells that spreadsheets interpret as formulas are escaped, reversibly."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sanm_lightning.safe_files import atomic_write

__all__ = ["escape_cell", "other_separator", "read_csv", "unescape_cell", "write_csv"]

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")


def escape_cell(text: str) -> str:
    """Prepend ``'`` to text that a spreadsheet would interpret as a formula, and to text that is already escaped."""
    return "'" + text if _FORMULA.match(text) else text


def unescape_cell(text: str) -> str:
    """Undo :func:`escape_cell`."""
    return text[1:] if _ESCAPED.match(text) else text


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table atomically, in UTF-8; invalid UTF-8 in names is preserved.

    Args:
        path: output file; an existing file is replaced.
        header: names of the columns.
        rows: rows of unescaped cells, one per column.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows([escape_cell(cell) for cell in row] for row in rows)
        text.flush()
        text.detach()


def other_separator(path: str | Path, header: Sequence[str]) -> str | None:
    """Return the error of a table whose header has one cell with semicolons or tabs; None for other headers.

    Args:
        path: path of the file.
        header: cells of the header, read with commas as separators.
    """
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            return (
                f"expected a CSV file separated by commas in {str(path)!r}, got {name}; save it as 'CSV UTF-8 (comma "
                "delimited)'"
            )
    return None


def read_csv(path: str | Path, headers: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Read a table written by :func:`write_csv`.

    Args:
        path: path of the file.
        headers: accepted headers.

    Returns:
        The header of the file and its unescaped rows; blank lines are ignored.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is empty or not CSV, is not separated by commas, has another header, or a row with more or
            fewer cells than the header.
    """
    path = Path(path)
    expected = " or ".join(repr(",".join(header)) for header in headers)
    if not path.is_file():
        raise FileNotFoundError(f"expected a CSV file in {str(path)!r}, got no such file; check the path")
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"expected a CSV file in {str(path)!r}, got {error}; save it as CSV again") from error
    if not rows:
        raise ValueError(f"expected the header {expected} in {str(path)!r}, got an empty file; write it again")
    header = rows.pop(0)
    if separated := other_separator(path, header):
        raise ValueError(separated)
    if header not in [list(accepted) for accepted in headers]:
        found = ",".join(header)[:200]
        raise ValueError(f"expected the header {expected} in {str(path)!r}, got {found!r}; check the path")
    uneven = next((number for number, row in enumerate(rows) if len(row) != len(header)), None)
    if uneven is not None:
        raise ValueError(
            f"expected {len(header)} cells in each row of {str(path)!r}, got {len(rows[uneven])} in row {uneven + 1}; "
            "separate the cells with commas"
        )
    return header, [[unescape_cell(cell) for cell in row] for row in rows]
