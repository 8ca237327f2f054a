"""Check the options of a study with the parser of ``sanm fit``, before a cell is run."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sanm_lightning.study.cells import Cell

__all__ = ["check_options"]


def check_options(study: str, cells: Sequence[Cell]) -> None:
    """Require that ``sanm fit`` accepts the options of all cells.

    Cells that differ in noise and seed only are parsed once, and cells without options are not parsed.

    Args:
        study: name of the study.
        cells: its cells.

    Raises:
        ValueError: if an option is unknown or has a value of another type, or a file that the parser reads does not exist.
    """
    distinct: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        if cell.options or cell.after:
            options = json.dumps([cell.options, cell.after is not None], sort_keys=True, default=str)
            distinct.setdefault((cell.method, cell.sanm, cell.data, cell.overlay, options), cell)
    if not distinct:
        return
    from sanm_lightning.cli import FitParser

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where the cells are run, for classes of the user
    parser = FitParser()
    for cell in distinct.values():
        try:
            parser.check(cell.command(Path())[1:])
        except (ValueError, OSError) as error:
            where = f" in the cell {cell.folder!r} of the study {study!r}"
            raise ValueError(str(error).replace(", got ", f"{where}, got ", 1)) from error
