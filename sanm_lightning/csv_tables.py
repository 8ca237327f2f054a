"""CSV files that spreadsheets do not execute: cells that look like formulas are escaped, reversibly."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sanm_lightning.safe_files import atomic_write

__all__ = ["escape_cell", "read_csv", "unescape_cell", "write_csv"]

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_ESCAPED = re.compile(r"'+[=+\-@\t\r]")


def escape_cell(text: str) -> str:
    """Put a ``'`` before a text that a spreadsheet would take for a formula, or that starts like one escaped before."""
    return "'" + text if _FORMULA.match(text) else text


def unescape_cell(text: str) -> str:
    """Undo :func:`escape_cell`."""
    return text[1:] if _ESCAPED.match(text) else text


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table, whole or not at all; UTF-8, with names that are not UTF-8 kept byte by byte.

    Args:
        path: the file; one that exists is replaced.
        header: names of the columns.
        rows: one text per column each; escaped here.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(header)
        writer.writerows([escape_cell(cell) for cell in row] for row in rows)
        text.flush()
        text.detach()


def read_csv(path: str | Path, headers: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Read a table that :func:`write_csv` wrote.

    Args:
        path: the file.
        headers: the headers that are accepted.

    Returns:
        The header that the file has, and its rows, unescaped. Blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, has another header, a row has more or fewer cells than the header, or it is not CSV.
    """
    path = Path(path)
    expected = " or ".join(repr(",".join(header)) for header in headers)
    if not path.is_file():
        raise FileNotFoundError(f"expected a CSV file in {str(path)!r}, where there is no file; check the path")
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except csv.Error as error:
        raise ValueError(f"expected a CSV file in {str(path)!r}, got {error}; save it as CSV again") from error
    if not rows:
        raise ValueError(f"expected the header {expected} in {str(path)!r}, got an empty file; write it again")
    header = rows.pop(0)
    if header not in [list(accepted) for accepted in headers]:
        found = ",".join(header)[:200]
        raise ValueError(
            f"expected the header {expected} in {str(path)!r}, got {found!r}; check that it is the right file"
        )
    uneven = next((number for number, row in enumerate(rows) if len(row) != len(header)), None)
    if uneven is not None:
        raise ValueError(
            f"expected {len(header)} cells in each row of {str(path)!r}, got {len(rows[uneven])} in row {uneven + 1}; save it "
            "with commas between the cells"
        )
    return header, [[unescape_cell(cell) for cell in row] for row in rows]
