"""Seconds of training until the mean accuracy of a row reaches a value."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Curve", "curve_of"]


class Curve(NamedTuple):
    """Mean accuracy over seeds by training time.

    Attributes:
        seconds: mean training seconds until each evaluation, with pre-training and without evaluations.
        accuracies: mean accuracies of these evaluations in percent.
        machines: what the runs were trained on.
    """

    seconds: tuple[float, ...]
    accuracies: tuple[float, ...]
    machines: tuple[str, ...]

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the training seconds until the first evaluation with this accuracy; None if there is none.

        Args:
            accuracy: accuracy in percent.
        """
        pairs = zip(self.seconds, self.accuracies, strict=True)
        return next((seconds for seconds, reached in pairs if reached >= accuracy), None)


def curve_of(runs: Sequence[dict[str, Any]], before: dict[str, Any] | None, split: str) -> Curve | None:
    """Return the mean over runs at the epochs that all of them evaluated.

    Args:
        runs: contents of ``results.json``, one per seed.
        before: that of the run whose network is their start; None if there is none.
        split: ``test`` or ``val``.

    Returns:
        The curve; None without runs, or if a run was not timed, as those of earlier versions.
    """
    everything = [*runs, *([] if before is None else [before])]
    if not runs or not all(run.get("timing") for run in everything):
        return None
    first = 0.0 if before is None else before["seconds"] - before["timing"]["evaluation_seconds"]
    points = [_points(run["timing"], f"{split}_accuracy") for run in runs]
    epochs = [epoch for epoch in points[0] if all(epoch in found for found in points)]
    means = [[statistics.fmean(found[epoch][part] for found in points) for epoch in epochs] for part in (0, 1)]
    machines = dict.fromkeys(machine for run in everything for machine in run["timing"]["machines"])
    return Curve(
        tuple(first + seconds for seconds in means[0]), tuple(100 * part for part in means[1]), tuple(machines)
    )


def _points(timing: dict[str, Any], name: str) -> dict[int, tuple[float, float]]:
    """Return training seconds and accuracy by epoch."""
    lists = (timing["epoch"], timing["training_seconds"], timing.get(name) or [None] * len(timing["epoch"]))
    return {epoch: (seconds, accuracy) for epoch, seconds, accuracy in zip(*lists, strict=True) if accuracy is not None}
