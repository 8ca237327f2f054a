"""Charts of a run: losses with their mixture, label quality over epochs, ROC curve, transition matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from sanm_lightning.functional import Mixture, mixture_posterior
from sanm_lightning.pictures.evidence import Losses
from sanm_lightning.pictures.style import (
    BLACK,
    COLORMAP,
    EXTRA,
    FONT,
    RIGHT,
    WIDTH,
    WRONG,
    drawing,
    new_figure,
    plain_text,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUANTILES", "crossings", "histogram_figure", "quality_figure", "roc_figure", "transition_figure"]

BINS = 50
GRID = 2001
"""Points at which densities and posteriors are evaluated."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ANNOTATED = 20
"""Classes up to which the cells of a transition matrix hold numbers."""
BESIDE = 10
"""Classes up to which two transition matrices are drawn side by side."""
NAMED = 40
"""Classes up to which all of them are named at the axes."""


def crossings(mixture: Mixture) -> list[float]:
    """Return the losses at which the posterior of a mixture crosses .5, within the range of its fit."""
    grid = torch.linspace(float(mixture.low), float(mixture.high), GRID, dtype=torch.float64)
    above = mixture_posterior(mixture, grid.to(mixture.low.dtype)) >= 0.5
    places = (above[1:] != above[:-1]).nonzero()[:, 0]
    found: list[float] = ((grid[places] + grid[places + 1]) / 2).tolist()
    return found


def histogram_figure(panels: list[Losses]) -> Figure:
    """Draw the histogram of each network's losses with the two components that are fitted to them.

    Args:
        panels: one per network.
    """
    with drawing():
        figure = new_figure(3.5 if len(panels) == 1 else WIDTH, 3.2)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _histogram(axis, panel)
        labels = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(
            labels.values(), labels.keys(), loc="outside upper center", ncols=2 if len(panels) == 1 else 5,
            labelspacing=0.25, columnspacing=1.0,
        )  # fmt: skip
    return figure


def _histogram(axis: Any, panel: Losses) -> None:
    values, mixture = panel.values.double(), panel.mixture
    low, high = float(values.min()), float(values.max())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
    if panel.wrong is None:
        axis.hist(values.numpy(), bins=edges, color="#BBBBBB", label="labels")
    else:
        _, _, (_, hatched) = axis.hist(
            [values[~panel.wrong].numpy(), values[panel.wrong].numpy()], bins=edges, stacked=True,
            color=[RIGHT, WRONG], label=["right labels", "wrong labels"],
        )  # fmt: skip
        for patch in hatched:
            patch.set(hatch="////", edgecolor=BLACK, linewidth=0.0)
    grid = torch.linspace(low, high, GRID, dtype=torch.float64)
    span = max(float(mixture.high - mixture.low), 1e-12)
    for number, (name, line) in enumerate((("lower component", "-"), ("higher component", "--"))):
        weight, mean, variance = (float(part[number]) for part in mixture[2:])
        if weight > 0:
            scaled = (grid - float(mixture.low)) / span
            density = torch.exp(-0.5 * (scaled - mean) ** 2 / variance) / math.sqrt(2 * math.pi * variance)
            height = weight * density * len(values) * (high - low) / BINS / span
            axis.plot(grid.numpy(), height.numpy(), color="white", linewidth=3.0)
            axis.plot(grid.numpy(), height.numpy(), color=BLACK, linestyle=line, label=name)
    for place in crossings(mixture):
        axis.axvline(place, color=EXTRA, linestyle=":", linewidth=2.0, label="posterior 0.5")
    axis.set(
        title=plain_text(panel.title),
        xlabel=panel.axis,
        ylabel="training samples (square-root scale)",
        xlim=(low, high),
    )
    counts = torch.histogram(values, torch.tensor(edges, dtype=torch.float64)).hist
    axis.set_ylim(0, 1.05 * max(1.0, float(counts.max())))
    axis.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))  # both components can be seen


def quality_figure(history: dict[int, dict[str, Any]], first_mask: int | None = None) -> Figure:
    """Draw label quality over the epochs.

    Args:
        history: for each number of finished epochs ``quantiles`` (see :data:`QUANTILES`) and the means ``right`` and
            ``wrong``, None where true labels are not known.
        first_mask: the epoch in which the first mask is drawn.
    """
    epochs = sorted(history)
    columns = list(zip(*(history[epoch]["quantiles"] for epoch in epochs), strict=True))
    known = [epoch for epoch in epochs if history[epoch]["right"] is not None and history[epoch]["wrong"] is not None]
    from matplotlib.ticker import MaxNLocator

    with drawing():
        figure = new_figure(3.5, 3.0)
        axis = figure.subplots()
        axis.fill_between(epochs, columns[0], columns[4], color="#DDDDDD", label="5 to 95 % of the labels")
        axis.fill_between(epochs, columns[1], columns[3], color="#AAAAAA", label="25 to 75 %")
        marker = "o" if len(epochs) == 1 else None
        axis.plot(epochs, columns[2], color=BLACK, marker=marker, markersize=4, label="median")
        if known:
            for key, color, line, sign in (("right", RIGHT, "--", "^"), ("wrong", WRONG, "-.", "v")):
                axis.plot(
                    known, [history[epoch][key] for epoch in known], color=color, linestyle=line, marker=sign,
                    markersize=4, markeredgecolor=BLACK, markeredgewidth=0.4, markevery=max(1, len(known) // 12),
                    label=f"mean of {key} labels",
                )  # fmt: skip
        if first_mask is not None and epochs[0] <= first_mask <= epochs[-1]:
            axis.axvline(first_mask, color=EXTRA, linestyle=":", linewidth=2.0, label="first mask")
        axis.set(xlabel="finished epochs", ylabel="label quality G", ylim=(-0.02, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=2, labelspacing=0.25, columnspacing=1.0)
    return figure


def roc_figure(quality: Tensor, wrong: Tensor, title: str = "Wrong labels found by label quality") -> Figure:
    """Draw the ROC curve of low label quality as a sign of a wrong label.

    Args:
        quality: shape (M,), in [0, 1].
        wrong: shape (M,), bool; some labels are wrong and some are not.
        title: of the picture.
    """
    score = 1 - quality.double()
    false, true, _ = binary_roc(score, wrong.long())
    area = float(binary_auroc(score, wrong.long()))
    below = quality < 0.5
    with drawing():
        figure = new_figure(3.5, 3.5)
        axis = figure.subplots()
        axis.plot(false.numpy(), true.numpy(), color=RIGHT, label=f"label quality, area {area:.3f}")
        axis.plot([0, 1], [0, 1], color=BLACK, linestyle="--", linewidth=0.8, label="chance, area 0.500")
        if bool(below.any()) and not bool(below.all()):
            place = float(below[~wrong].double().mean()), float(below[wrong].double().mean())
            axis.plot(
                *place, color=WRONG, marker="D", markersize=6, markeredgecolor=BLACK, linestyle="none", clip_on=False,
                label=f"G < 0.5: {100 * place[1]:.1f} % of the wrong\nand {100 * place[0]:.1f} % of the right labels", zorder=3,
            )  # fmt: skip
        axis.set(
            title=plain_text(title), xlim=(0, 1), ylim=(0, 1.01), aspect="equal",
            xlabel="fraction of the right labels that are found", ylabel="fraction of the wrong labels that are found",
        )  # fmt: skip
        axis.legend(loc="lower right")
    return figure


def transition_figure(panels: list[tuple[str, str, Tensor]], names: list[str]) -> Figure:
    """Draw transition matrices: for each class, in a row, the percentages of the given labels.

    Args:
        panels: for each matrix its title, the name of its rows, and counts (C, C) of the given labels (columns).
        names: C class names.
    """
    from matplotlib.colors import PowerNorm

    classes = len(panels[0][2])
    shown = [short(name) for name in names[:classes]]
    step = 1 if classes <= NAMED else math.ceil(classes / NAMED)
    ticks = list(range(0, classes, step))
    labels = [shown[tick] for tick in ticks]
    numbers = all(name.isdigit() and len(name) <= 2 for name in labels)
    beside = classes <= BESIDE  # else one below the other, so that the numbers stay readable
    across, down = (len(panels), 1) if beside else (1, len(panels))
    margin = 0.7 if numbers else 1.4
    side = (WIDTH - margin - 1.0) / 2 if beside else min(WIDTH - margin - 0.8, max(3.0, 0.2 * classes))
    with drawing():
        figure = new_figure(across * (side + 0.2) + margin + 0.6, down * (side + margin))
        axes = figure.subplots(down, across, squeeze=False)
        for axis, (title, rows, counts) in zip(axes.flat, panels, strict=True):
            total = counts.sum(1, keepdim=True).double()
            percent = torch.where(total > 0, 100 * counts / total.clamp(min=1), torch.nan)
            image = axis.imshow(percent.numpy(), cmap=COLORMAP, norm=PowerNorm(0.5, 0, 100))  # shows small cells, too
            axis.set_facecolor("#DDDDDD")  # of classes without samples
            axis.set(title=plain_text(title), xlabel="given label", ylabel=rows)
            axis.set_xticks(ticks, labels, rotation=0 if numbers and classes <= NAMED else 90)
            axis.set_yticks(ticks, labels if not beside or axis is axes[0, 0] else [""] * len(ticks))
            if classes <= ANNOTATED:
                _annotate(axis, percent)
        figure.colorbar(image, ax=axes, label="percent of the row", fraction=0.05, pad=0.02, aspect=25)
    return figure


def _annotate(axis: Any, percent: Tensor) -> None:
    """Write the numbers into the cells."""
    for row, values in enumerate(percent.tolist()):
        for column, value in enumerate(values):
            if not math.isnan(value):
                color = BLACK if value > 20 else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=FONT, color=color)
