"""The folder of a study: ``cells.json``, and a run folder per cell with its state and its results."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sanm_lightning.safe_files import atomic_write
from sanm_lightning.study.cells import Cell
from sanm_lightning.study.state import State, read_json, read_state

__all__ = ["Record", "SavedRecord", "open_record"]

CELLS, RESULTS = "cells.json", "results.json"


class Record:
    """The folder of a study.

    Args:
        root: the folder; it need not exist.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.root / cell.folder

    def state(self, cell: Cell) -> State:
        """Return the state of a cell."""
        return read_state(self.folder(cell))

    def results(self, cell: Cell) -> dict[str, Any]:
        """Return the results of a cell so far; empty if there are none."""
        return read_json(self.folder(cell) / RESULTS) or {}

    def read(self) -> tuple[str, str | None, list[Cell]]:
        """Return name, table of published values and cells of the study in this folder.

        Raises:
            FileNotFoundError: if the folder is not that of a study.
        """
        content = read_json(self.root / CELLS)
        if content is None:
            raise FileNotFoundError(
                f"expected the folder of a study, got {str(self.root)!r} without {CELLS}; run 'sanm study FILE --out "
                f"{self.root}' first"
            )
        try:
            return content["study"], content["published"], [Cell.from_json(cell) for cell in content["cells"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected the cells of a study in {str(self.root / CELLS)!r}, got other content; choose the folder of a study"
            ) from error

    def with_earlier(self, name: str, cells: list[Cell]) -> list[Cell]:
        """Return the cells of a study, and those that were run in this folder and are no longer in the study.

        Args:
            name: name of the study.
            cells: the cells of the study.

        Raises:
            ValueError: if the folder is that of another study, or the settings of a cell that was run have changed.
            FileExistsError: if the folder has other contents.
        """
        known: list[Cell] = []
        if (self.root / CELLS).exists():
            before, _, known = self.read()
            if before != name:
                raise ValueError(
                    f"expected the folder of the study {name!r}, got that of {before!r} in {str(self.root)!r}; choose "
                    "another folder with --out"
                )
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise FileExistsError(
                f"expected a new folder or that of a study, got {str(self.root)!r} with other contents; choose another "
                "folder with --out"
            )
        new = {cell.folder: cell for cell in cells}
        for cell in known:
            if self.state(cell).state != "not run" and cell.digest != new.setdefault(cell.folder, cell).digest:
                raise ValueError(
                    f"expected the study as it was when {cell.folder} was run, got other settings ("
                    f"{_change(cell, new[cell.folder])}); choose another folder with --out, or remove "
                    f"{str(self.folder(cell))!r}"
                )
        return list(new.values())

    def write(self, name: str, published: str | None, cells: list[Cell]) -> None:
        """Write the cells of a study.

        Args:
            name: name of the study.
            published: name of the table of published values; None if there is none.
            cells: the cells.

        Raises:
            OSError: if the folder cannot be written.
        """
        listed = [asdict(cell) for cell in cells]
        content = {"study": name, "published": published, "cells": listed}
        with atomic_write(self.root / CELLS) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def saved(self) -> dict[str, Any]:
        """Return cells, states and results as one JSON object, which :class:`SavedRecord` reads."""
        study, published, cells = self.read()
        listed = [
            {"cell": asdict(cell), "state": asdict(self.state(cell)), "results": self.results(cell)} for cell in cells
        ]
        return {"study": study, "published": published, "saved": listed}


class SavedRecord(Record):
    """The results of a study in one file.

    Args:
        path: file written by ``sanm table --format json``.

    Raises:
        ValueError: if the file has other content.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._content = read_json(self.root)
        try:
            self._parts = {Cell.from_json(part["cell"]).folder: part for part in self._content["saved"]}
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"expected the results of a study in {str(path)!r}, got other content; write the file with 'sanm table FOLDER "
                f"--format json --out {path}'"
            ) from error

    def state(self, cell: Cell) -> State:
        """Return the state of a cell."""
        return State(**self._parts[cell.folder]["state"])

    def results(self, cell: Cell) -> dict[str, Any]:
        """Return the results of a cell; empty if there are none."""
        results: dict[str, Any] = self._parts[cell.folder]["results"]
        return results

    def read(self) -> tuple[str, str | None, list[Cell]]:
        """Return name, table of published values and cells of the study."""
        cells = [Cell.from_json(part["cell"]) for part in self._parts.values()]
        return self._content["study"], self._content["published"], cells


def open_record(path: str | Path) -> Record:
    """Return the record of a study: its folder, or a file of its results."""
    return SavedRecord(path) if Path(path).is_file() else Record(path)


def _change(before: Cell, now: Cell) -> str:
    """Return the first difference between the commands of two cells."""
    names = [name for name in {**before.options, **now.options} if before.options.get(name) != now.options.get(name)]
    if names:
        return f"{names[0]} {now.options.get(names[0], 'not given')} instead of {before.options.get(names[0], 'not given')}"
    other = sorted(set(before.configs) ^ set(now.configs))
    return f"config {other[0]}" if other else "the content of a config"
