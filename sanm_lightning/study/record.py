"""The folder of a study: ``cells.json``, and a run folder per cell with its state and its results."""

import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sanm_lightning.safe_files import atomic_write
from sanm_lightning.study.cells import Cell

__all__ = ["Record", "State", "is_locked", "read_state", "write_state"]

CELLS, STATE, RESULTS, LOCK = "cells.json", "state.json", "results.json", "lock"


@dataclass(frozen=True)
class State:
    """State of a cell.

    Attributes:
        state: what happened to the cell; ``interrupted`` cells can be resumed.
        reason: last line of the error of a failed or interrupted cell.
        attempts: number of times that the cell was started.
    """

    state: Literal["not run", "running", "finished", "failed", "interrupted"] = "not run"
    reason: str = ""
    attempts: int = 0


def is_locked(folder: Path) -> bool:
    """Return whether a process runs in this run folder; the lock of a killed process is released by the system."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_state(folder: Path) -> State:
    """Return the state of a cell from its run folder."""
    content = _read(folder / STATE)
    if content is None:
        return State()
    state = State(**content)
    if state.state == "running" and not is_locked(folder):
        return State("interrupted", "the process was killed", state.attempts)
    return state


def write_state(folder: Path, state: State) -> None:
    """Write the state of a cell to its run folder."""
    _write(folder / STATE, asdict(state))


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
        return _read(self.folder(cell) / RESULTS) or {}

    def read(self) -> tuple[str, str | None, list[Cell]]:
        """Return name, table of published values and cells of the study in this folder.

        Raises:
            FileNotFoundError: if the folder is not that of a study.
        """
        content = _read(self.root / CELLS)
        if content is None:
            raise FileNotFoundError(
                f"expected the folder of a study, got {str(self.root)!r} without {CELLS}; run 'sanm study FILE --out "
                f"{self.root}' first"
            )
        return content["study"], content["published"], [Cell.from_json(cell) for cell in content["cells"]]

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
            if self.state(cell).state != "not run":
                if cell.digest != new.setdefault(cell.folder, cell).digest:
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
        _write(self.root / CELLS, {"study": name, "published": published, "cells": listed})


def _change(before: Cell, now: Cell) -> str:
    """Return the first difference between the commands of two cells."""
    names = [name for name in {**before.options, **now.options} if before.options.get(name) != now.options.get(name)]
    if names:
        return f"{names[0]} {now.options.get(names[0], 'not given')} instead of {before.options.get(names[0], 'not given')}"
    other = sorted(set(before.configs) ^ set(now.configs))
    return f"config {other[0]}" if other else "the content of a config"


def _read(path: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"expected a JSON file, got {str(path)!r} ({error}); remove the file") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
