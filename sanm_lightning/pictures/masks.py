"""Draw samples with activation map, masked view, reconstruction and label quality."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sanm_lightning.pictures.style import BLACK, COLORMAP, FONT, WIDTH, drawing, new_figure, plain_text, save
from sanm_lightning.sanm.views import Views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SampleBlock", "draw_views", "samples_figure"]

TEXT = 1.9
"""Width of the text beside a sample, in units of an image."""


class SampleBlock(NamedTuple):
    """Samples that belong together, one per row of a picture."""

    heading: str
    images: Tensor
    """(B, C, H, W), in [0, 1]."""
    views: Views
    """Masked views of the images, with activation maps."""
    reconstruction: Tensor | None
    """(B, C, H, W), or None."""
    texts: list[str]
    """B texts of up to four lines."""


def draw_views(path: Path, images: Tensor, views: Views, reconstruction: Tensor | None, titles: list[str]) -> None:
    """Write a PNG with one row per image: its title, image, activation map, masked view and optional reconstruction.

    Args:
        path: output file; its folder is created.
        images: images, shape (B, C, H, W), in [0, 1].
        views: masked views of the images, with activation maps.
        reconstruction: reconstructed images, shape (B, C, H, W), or None.
        titles: B titles.

    Raises:
        ValueError: if nothing was masked.
    """
    save(
        samples_figure(
            [SampleBlock("", images, views, reconstruction, [title.replace("$", r"\$") for title in titles])]
        ),
        path,
    )


def samples_figure(blocks: list[SampleBlock]) -> Figure:
    """Draw blocks of samples side by side.

    Args:
        blocks: one or two, with the same columns.

    Raises:
        ValueError: if nothing was masked.
    """
    columns = [_columns(block) for block in blocks]
    names = list(columns[0])
    rows = max(len(block.images) for block in blocks)
    with drawing():
        cell = WIDTH / 2 / (TEXT + len(names))
        head = 0.45 if any(block.heading for block in blocks) else 0.25
        figure = new_figure(WIDTH / 2 * len(blocks), max(cell, 0.56) * rows + head)
        figure.get_layout_engine().set(w_pad=0.01, h_pad=0.015, wspace=0.0, hspace=0.0)  # type: ignore[union-attr, call-arg]
        parts = figure.subfigures(1, len(blocks), squeeze=False, wspace=0.03)[0]
        for part, block, pictures in zip(parts, blocks, columns, strict=True):
            if block.heading:
                part.suptitle(plain_text(block.heading), fontweight="bold")
            axes = part.subplots(rows, len(names) + 1, squeeze=False, width_ratios=[TEXT, *[1] * len(names)])
            for axis in axes.flat:
                axis.axis("off")
            for axis, name in zip(axes[0, 1:], names, strict=True):
                axis.set_title(name, fontsize=FONT, pad=3)
            for row, text in enumerate(block.texts):
                axes[row, 0].text(0, 0.5, text, va="center", ha="left", fontsize=FONT, transform=axes[row, 0].transAxes)
                for axis, name in zip(axes[row, 1:], names, strict=True):
                    _show(axis, pictures[name][row], _box(block.views, row) if name == "map" else None)
    return figure


def _columns(block: SampleBlock) -> dict[str, Tensor]:
    views, size = block.views, len(block.images)
    if views.activation is None or views.ratio is None:
        raise ValueError("expected masked views, got views without activation maps; draw them after the warm-up")
    copies = 1 if views.box is None else len(views.box) // size
    masked = views.images[-copies * size :]  # unmasked images that are learned from come first
    columns = {"image": block.images, "map": views.activation}
    for name, part in zip(("masked", "trough"), masked.split(size), strict=False):
        columns[name] = part
    if block.reconstruction is not None:
        columns["rebuilt"] = block.reconstruction
    return {name: part.detach().float().cpu() for name, part in columns.items()}


def _box(views: Views, row: int) -> list[float] | None:
    """Return top, bottom, left and right edge of the pixels that are masked at the peak; None where there are none."""
    if views.box is None:
        return None
    up, down, left, right = views.box[row].tolist()
    height, width = views.images.shape[2:]
    top, bottom = math.ceil(up), min(math.floor(down), height - 1)
    first, last = math.ceil(left), min(math.floor(right), width - 1)
    empty = down <= up or right <= left or bottom < top or last < first
    return None if empty else [top - 0.5, bottom + 0.5, first - 0.5, last + 0.5]


def _show(axis: Any, picture: Tensor, box: list[float] | None) -> None:
    """Draw an image (C, H, W) or a map (H, W), with the outline of a box."""
    if picture.ndim == 3:
        colors = picture.clamp(0, 1) if len(picture) >= 3 else picture[:1].clamp(0, 1).expand(3, -1, -1)
        axis.imshow(colors.permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        axis.imshow(torch.nan_to_num(picture).numpy(), cmap=COLORMAP, interpolation="nearest")
    if box is not None:
        from matplotlib.patches import Rectangle

        top, bottom, left, right = box
        for color, width in ((BLACK, 2.2), ("white", 1.0)):  # visible on light and on dark ground
            outline = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, lw=width)
            axis.add_patch(outline)
