"""How far a study is: finished, failed and running cells, epochs, and the time left."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sanm_lightning.study.cells import Cell
from sanm_lightning.study.record import Record
from sanm_lightning.study.state import State

__all__ = ["Progressed"]


@dataclass(frozen=True)
class Progressed:
    """Progress of a study.

    Attributes:
        counts: number of cells by state.
        done: seconds of training that are done.
        total: estimated seconds of training of all cells; 1 if unknown.
        left: the time left as text; empty if unknown.
    """

    counts: Counter[str]
    done: float
    total: float
    left: str

    @classmethod
    def of(cls, record: Record, cells: Sequence[Cell], states: Mapping[str, State], jobs: int) -> "Progressed":
        """Return the progress, from the seconds per epoch of cells of the same method, SANM and data, or of all cells.

        Args:
            record: folder of the study.
            cells: the cells.
            states: their states by folder.
            jobs: number of cells that run at once.
        """
        counts: Counter[str] = Counter(states[cell.folder].state for cell in cells)
        found = [(cell, record.results(cell)) for cell in cells]
        paces: dict[tuple[str, ...], list[float]] = {}
        for cell, results in found:
            if results.get("epochs"):
                paces.setdefault(cell.row[:3], []).append(results["seconds"] / results["epochs"])
        if not paces:
            return cls(counts, 0.0, 1.0, "")
        common = statistics.mean(pace for values in paces.values() for pace in values)
        done = left = 0.0
        for cell, results in found:
            pace = statistics.mean(paces.get(cell.row[:3], [common]))
            epochs = results.get("epochs", 0)
            done += pace * epochs
            if states[cell.folder].state in ("not run", "running", "interrupted"):
                left += pace * max((cell.epochs or epochs) - epochs, 0)
        return cls(counts, done, done + left, f"left {timedelta(seconds=round(left / jobs))}")

    def text(self, running: int) -> str:
        """Return the number of finished, failed and running cells.

        Args:
            running: number of running cells.
        """
        total, failed = sum(self.counts.values()), self.counts["failed"]
        return f"{self.counts['finished']} of {total} finished, {running} running" + (
            f", {failed} failed" if failed else ""
        )
