"""State of a cell in its run folder: ``state.json``, and a lock while a process runs there.

Only the standard library is imported: this module and ``launch`` are pickled by value, so that the process that starts a cell
and waits for it needs no torch.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["LOCK", "State", "is_locked", "read_json", "read_state", "write_state"]

STATE, LOCK = "state.json", "lock"


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
    content = read_json(folder / STATE)
    if content is None:
        return State()
    try:
        state = State(**content)
    except TypeError as error:
        raise ValueError(
            f"expected the state of a cell in {str(folder / STATE)!r}, got other content; remove the file to run the cell again"
        ) from error
    if state.state == "running" and not is_locked(folder):
        return State("interrupted", "the process was killed", state.attempts)
    return state


def write_state(folder: Path, state: State) -> None:
    """Write the state of a cell to its run folder, completely or not at all."""
    draft = folder / f"{STATE}.tmp"
    draft.write_text(json.dumps(asdict(state)) + "\n")
    os.replace(draft, folder / STATE)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"expected a JSON file, got {str(path)!r} ({error}); check the path, or remove the file if it is damaged"
        ) from error
