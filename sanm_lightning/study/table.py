"""The results of a study as rows, beside the published values, and the reasons why a row cannot be compared with them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sanm_lightning.study.cells import Cell
from sanm_lightning.study.published import Published
from sanm_lightning.study.record import Record
from sanm_lightning.study.seconds import Curve, curve_of
from sanm_lightning.study.state import State

__all__ = ["Row", "rows_of"]


@dataclass(frozen=True)
class Row:
    """All seeds of one method, SANM, data, noise and overlay.

    Attributes:
        method: name of the method.
        sanm: ``base``, ``sanm`` or the name of a config of ``configs/sanm``.
        data: name of the data.
        noise: name of the noise, or ``none``.
        variant: overlay and name of the grid; empty if there is neither.
        seeds: number of seeds of the study.
        best: accuracies of the best epochs by seed, in percent, of the finished cells; those of the test set, or of the split
            ``val`` without a test set.
        last: accuracies of the last epochs.
        published: published values in percent, with the keys ``best``, ``last`` and ``spread``.
        epochs: epochs of the finished cells, as text; empty without results.
        hours: total hours of all cells, also of unfinished ones.
        split: ``test``, or ``val`` if the finished cells have no test accuracy.
        missing: what is not finished, such as ``1 of 3 not run``; empty if nothing.
        reasons: why the accuracies cannot be compared with the published ones, or with other rows (known labels, runs that
            stopped early).
        curve: accuracy by training time of the finished cells; None if it was not recorded.
    """

    method: str
    sanm: str
    data: str
    noise: str
    variant: str
    seeds: int
    best: dict[int, float]
    last: dict[int, float]
    published: dict[str, float]
    epochs: str
    hours: float
    split: str
    missing: str
    reasons: tuple[str, ...]
    curve: Curve | None = None

    def mean(self, kind: str) -> float | None:
        """Return the mean accuracy over seeds in percent; None without results.

        Args:
            kind: ``best`` or ``last``.
        """
        values = getattr(self, kind).values()
        return statistics.fmean(values) if values else None

    def spread(self, kind: str) -> float | None:
        """Return the standard deviation over seeds (divided by n - 1) in percent; None with fewer than two seeds."""
        values = list(getattr(self, kind).values())
        return statistics.stdev(values) if len(values) > 1 else None

    def difference(self, kind: str) -> float | None:
        """Return mean minus published accuracy in percent; None if there is no result, no such value, or no comparison."""
        mean, published = self.mean(kind), self.published.get(kind)
        return None if mean is None or published is None or self.reasons else mean - published


def rows_of(record: Record, cells: Sequence[Cell], published: Published | None) -> list[Row]:
    """Return the rows of a study, in its order. Runs that only provide a pre-trained network are left out.

    Args:
        record: folder of the study.
        cells: its cells.
        published: its published values; None if there are none.
    """
    providers = {cell.after for cell in cells}
    before = {cell.folder: record.results(cell) for cell in cells if cell.folder in providers}
    grouped: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.listed or cell.folder not in providers:
            grouped.setdefault(cell.row, []).append(cell)
    return [_row(record, group, published, before) for group in grouped.values()]


def _row(record: Record, cells: list[Cell], published: Published | None, before: dict[str, dict[str, Any]]) -> Row:
    first = cells[0]
    key = first.method, first.sanm, first.data, first.noise
    known = {} if published is None else published.values.get(key, {})
    noted = () if published is None or key not in published.notes else (published.notes[key],)
    found = [record.results(cell) for cell in cells]
    states = [
        State("interrupted", "no results.json") if state.state == "finished" and not results else state
        for state, results in zip(map(record.state, cells), found, strict=True)
    ]
    finished = {
        cell.seed: results
        for cell, state, results in zip(cells, states, found, strict=True)
        if state.state == "finished"
    }
    split = _split(finished)
    epochs = sorted({results["epochs"] for results in finished.values()})
    return Row(
        method=first.method,
        sanm=first.sanm,
        data=first.data,
        noise=first.noise,
        variant=" ".join(part for part in (first.overlay, first.name) if part not in ("none", "")),
        seeds=len(cells),
        best=_percent(finished, f"{split}_accuracy_best"),
        last=_percent(finished, f"{split}_accuracy_last"),
        published=known,
        epochs=" to ".join(map(str, epochs if len(epochs) < 2 else (epochs[0], epochs[-1]))),
        hours=sum(results.get("seconds", 0.0) for results in found) / 3600,
        split=split,
        missing=_missing([(state.state, state.reason) for state in states]),
        reasons=(
            *_known_labels(cells),
            *noted,
            *(_reasons(cells, finished, split) if known else ()),
            *_stopped(cells, finished),
        ),
        curve=curve_of([*finished.values()], before.get(first.after, {}) if first.after else None, split),
    )


def _split(finished: dict[int, dict[str, Any]]) -> str:
    """Return the split of the accuracies of a row: ``val`` if no seed has a test accuracy."""
    tested = not finished or any(results["test_accuracy_best"] is not None for results in finished.values())
    return "test" if tested else "val"


def _percent(finished: dict[int, dict[str, Any]], name: str) -> dict[int, float]:
    return {seed: 100 * results[name] for seed, results in finished.items() if results[name] is not None}


def _missing(states: list[tuple[str, str]]) -> str:
    """Return the states that are not finished, with their number and the reasons of failures."""
    parts = []
    for kind in dict.fromkeys(state for state, _ in states if state != "finished"):
        reasons = dict.fromkeys(reason for state, reason in states if state == kind == "failed" and reason)
        number = sum(state == kind for state, _ in states)
        count = "" if number == len(states) else f"{number} of {len(states)} "
        parts.append(count + kind + (f": {'; '.join(reasons)}" if reasons else ""))
    return ", ".join(parts)


def _known_labels(cells: list[Cell]) -> tuple[str, ...]:
    """Return the reason why methods with known labels cannot be compared with others."""
    return ("true labels of a probe set are used",) if any("model.probe" in cell.options for cell in cells) else ()


def _reasons(cells: list[Cell], finished: dict[int, dict[str, Any]], split: str) -> tuple[str, ...]:
    """Return the differences of settings and of data from the published runs, without repetitions."""
    found = [difference for cell in cells for difference in cell.differences]
    if split == "val":
        found.append("other selection split (accuracy on val, without a test set)")
    if any(results.get("noise_kind") == "file" for results in finished.values()):
        found.append("labels from a noise file")
    return tuple(dict.fromkeys(found))


def _stopped(cells: list[Cell], finished: dict[int, dict[str, Any]]) -> tuple[str, ...]:
    """Return the numbers of epochs of runs that ended before their last epoch, which have another budget than other rows."""
    planned = {cell.seed: cell.epochs for cell in cells}
    found = [
        f"stopped after {results['epochs']} of {planned[seed]} epochs"
        for seed, results in finished.items()
        if planned[seed] is not None and results["epochs"] != planned[seed]
    ]
    return tuple(dict.fromkeys(found))
