"""The gain of SANM over its base, by method and noise rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sanm_lightning.pictures.style import BLACK, EXTRA, RIGHT, WRONG, drawing, new_figure, plain_text
from sanm_lightning.study.table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["gain", "gain_figure"]

COLORS, MARKERS = (RIGHT, WRONG, EXTRA, BLACK), "osD^vP*X"
"""Colors by variant of SANM."""


def gain(row: Row, base: Row) -> tuple[float, float] | None:
    """Return the gain of SANM in best accuracy in percentage points, and its standard deviation.

    The gain of each seed is the difference of two runs with the same seed, and thus the same wrong labels.

    Args:
        row: results with SANM.
        base: results without SANM of the same method, data, noise and overlay.

    Returns:
        Mean and standard deviation (NaN for one seed) over the seeds of both; None if they have none in common.
    """
    differences = [row.best[seed] - base.best[seed] for seed in row.best if seed in base.best]
    if not differences:
        return None
    return statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else math.nan


def gain_figure(rows: Sequence[Row]) -> Figure:
    """Draw the gain of each variant of SANM over its base, one panel per data set, grouped by method and noise.

    Filled marks are measured, with the standard deviation over seeds; open marks are published values of comparable runs.

    Args:
        rows: rows of a study.

    Raises:
        ValueError: if no method has finished seeds both with and without SANM.
    """
    panels = _panels(rows)
    if not any(measured for bars in panels.values() for _, _, measured, _ in bars):
        raise ValueError(
            "expected a method with finished seeds both with and without SANM, got none; run both, or omit --figure"
        )
    places = {data: list(dict.fromkeys(place for place, *_ in bars)) for data, bars in panels.items()}
    with drawing():
        figure = new_figure(7.0, 0.9 + sum(0.45 + 0.22 * len(found) for found in places.values()))
        heights = [1 + len(found) for found in places.values()]
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
        kinds = list(dict.fromkeys(kind for bars in panels.values() for _, kind, _, _ in bars))
        for axis, (data, bars) in zip(axes, panels.items(), strict=True):
            _draw(axis, data, bars, places[data], kinds)
        axes[-1].set_xlabel("gain in best test accuracy over the method alone, percentage points")
        labels = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="outside upper center", ncols=4)
    return figure


Bar = tuple[str, str, tuple[float, float] | None, float | None]
"""Method and noise; variant of SANM; measured gain; published gain."""


def _panels(rows: Sequence[Row]) -> dict[str, list[Bar]]:
    bases = {(row.method, row.data, row.noise, row.variant): row for row in rows if row.sanm == "base"}
    panels: dict[str, list[Bar]] = {}
    for row in rows:
        base = bases.get((row.method, row.data, row.noise, row.variant))
        if row.sanm == "base" or base is None:
            continue
        both = "best" in row.published and "best" in base.published and not row.reasons and not base.reasons
        published = row.published["best"] - base.published["best"] if both else None
        measured = gain(row, base)
        if measured or published is not None:
            place = " ".join(part for part in (row.method, row.noise, row.variant) if part not in ("", "none"))
            panels.setdefault(row.data, []).append((place, row.sanm, measured, published))
    return panels


def _draw(axis: Any, data: str, bars: list[Bar], places: list[str], kinds: list[str]) -> None:
    for place, kind, measured, published in bars:
        number = kinds.index(kind)
        height = places.index(place) + 0.6 * ((number + 0.5) / len(kinds) - 0.5)
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        if measured:
            mean, spread = measured
            axis.errorbar(mean, height, xerr=None if math.isnan(spread) else spread, linestyle="", elinewidth=0.8,
                          label=plain_text(kind), **style)  # fmt: skip
        if published is not None:
            axis.plot(
                published, height, linestyle="", fillstyle="none", label=plain_text(f"{kind}, published"), **style
            )
    axis.axvline(0, color=BLACK, linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(places)), [plain_text(place) for place in places])
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.set_title(plain_text(data), loc="left")
