"""Size, fonts and colors of the pictures, for printing at their original size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sanm_lightning.safe_files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "COLORMAP",
    "DPI",
    "EXTRA",
    "FONT",
    "RIGHT",
    "WIDTH",
    "WRONG",
    "drawing",
    "new_figure",
    "plain_text",
    "save",
    "short",
]

WIDTH = 7.0
"""Width of a full-width picture in inches: that of the text on a page, so that fonts are printed at their size."""
DPI = 150
COLORMAP = "cividis"
BLACK, RIGHT, WRONG, EXTRA = "#000000", "#0072B2", "#E69F00", "#CC79A7"
"""Colors of Okabe and Ito: right labels are blue, wrong labels orange and hatched."""
FONT = 8
"""Smallest font, in points."""

_SETTINGS: Any = {
    "font.size": FONT,
    "axes.titlesize": FONT + 1,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "figure.titlesize": FONT + 1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.usetex": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Apply the settings of the pictures, independent of those of the user."""
    import matplotlib  # slow to import and used here only
    import matplotlib.style

    with matplotlib.style.context("default"), matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # class names in any script
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches without a window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, completely or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    content = io.BytesIO()
    with drawing():
        figure.savefig(content, format="png", dpi=DPI, facecolor="white")
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def plain_text(text: str) -> str:
    """Return text on one line in which matplotlib finds no formula."""
    return " ".join(text.split()).replace("$", r"\$")


def short(name: str, length: int = 14) -> str:
    """Return a class name of at most ``length`` characters, without formulas or line breaks."""
    name = " ".join(name.split())
    return plain_text(name if len(name) <= length else name[: length - 1].rstrip() + "…")
