"""``sanm table``: the results of a study as a table beside the published values, and the gain of SANM as a figure."""

import json
from pathlib import Path
from typing import Literal

from rich.console import Console

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.pictures.style import save
from sanm_lightning.safe_files import atomic_write
from sanm_lightning.study.figure import gain_figure
from sanm_lightning.study.formats import FORMATS
from sanm_lightning.study.published import read_published
from sanm_lightning.study.record import open_record
from sanm_lightning.study.table import rows_of

__all__ = ["main", "table"]


def table(
    folder: str,
    format: Literal["markdown", "csv", "latex", "json"] = "markdown",
    out: str | None = None,
    figure: str | None = None,
    seconds_to: float | None = None,
) -> int:
    """Print or write the table of a study: mean and standard deviation over seeds, best and last, published, difference.

    Rows that cannot be compared with the published value are marked, with the reasons in a footnote.

    Args:
        folder: folder of the study, ``--out`` of ``sanm study``, or a file written with ``--format json``.
        format: format of the table; json is the cells, states and results of the study in one file.
        out: output file, which is replaced; default: the table is printed.
        figure: output ``.png`` file, which is replaced, of the gain of SANM over its base by method and noise rate.
        seconds_to: accuracy in (0, 1] for a column of the training seconds until the mean accuracy over seeds reaches it,
            which are comparable on one machine only.

    Returns:
        Exit status 0.

    Raises:
        ValueError: if the folder has no results, the figure has another extension or nothing to show, or the accuracy is not
            in (0, 1].
        OSError: if the folder is not that of a study, or a file cannot be written.
    """
    if figure is not None and Path(figure).suffix != ".png":
        raise ValueError(f"expected a file with extension .png for --figure, got {figure!r}; rename it")
    if seconds_to is not None and not 0 < seconds_to <= 1:
        raise ValueError(f"expected an accuracy in (0, 1] for --seconds-to, got {seconds_to:g}; write .9 for 90 %")
    record = open_record(folder)
    _, name, cells = record.read()
    if not any(record.results(cell) for cell in cells):
        raise ValueError(f"expected results of one or more cells, got none in {folder!r}; run 'sanm study' first")
    published = read_published(name) if name else None
    rows = rows_of(record, cells, published)
    if format == "json":
        text = json.dumps(record.saved(), indent=1) + "\n"
    else:
        accuracy = None if seconds_to is None else 100 * seconds_to
        text = FORMATS[format](rows, published.source if published else None, accuracy)
    drawn = gain_figure(rows) if figure is not None else None
    if out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        with atomic_write(out) as file:
            file.write(text.encode())
    console = Console(highlight=False, stderr=True)
    if drawn is not None and figure is not None:
        save(drawn, figure)
        console.print(f"figure: {figure}", markup=False, soft_wrap=True)
    return 0


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm table``, run it and return the exit status."""
    parser = CommandParser(
        prog="sanm table", description="Table of the results of a study beside the published values."
    )
    parser.add_argument("folder", type=str, help="folder of the study, or a file of its results")
    parser.add_argument(
        "--seconds-to",
        "--seconds_to",
        type=float,
        metavar="ACCURACY",
        help="add the training seconds to an accuracy in (0, 1]",
    )
    parser.add_function_arguments(table, skip={"folder", "seconds_to"}, as_group=False)
    return table(**parser.parse_args(words).as_dict())
