"""``report.html``: list of label issues to review, in one file that opens without server or network access."""

import base64
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.safe_files import atomic_write

__all__ = ["write_report"]

_MAX_MATRIX = 40
"""Maximum number of classes for which the transition matrix is shown."""

Array = np.ndarray[Any, Any]
Images = Callable[[int], Array]


def write_report(
    folder: str | Path,
    issues: LabelIssues,
    summary: Mapping[str, Any],
    images: Images | None,
    *,
    root: str | Path | None = None,
    transition: Array | None = None,
    embed: int = 500,
    thumb_size: int = 96,
) -> Path:
    """Write ``report.html``, and ``thumbs/`` for images that cannot be shown from their files.

    The first ``embed`` images, by increasing quality, are embedded in the page. Other images are shown from their files
    if ``root`` is given or paths are absolute, otherwise from ``thumbs/<rank>.jpg``. The browser stores verdicts under a
    hash of names, splits and given labels, so a second audit of the same data restores them.

    Args:
        folder: output folder; created if missing, files of the same names are replaced.
        issues: the table.
        summary: further content of the page; every key may be missing or None. ``title``; ``verdict``, one line, or
            ``estimated_noise_rate`` in [0, 1], ``interval`` [low, high], ``num_images`` and ``worst_pair`` [given,
            suggested], from which it is composed; ``classes``, mappings with ``name``, ``count``, ``wrong`` (fraction)
            and ``confused_with``; ``classes_of``, the split that they describe, if there are others; ``findings``,
            mappings with ``title``, ``items`` (lists of paths that form a group) and ``count`` (if larger than the
            number of listed groups), such as duplicates and leaks; ``notes``, sentences.
        images: function that returns the image of row i of ``issues``, uint8, shape (H, W, 3) or (H, W); None for no
            images. Called only for readable rows that are embedded or written to ``thumbs/``.
        root: folder that the paths are relative to; None without files.
        transition: estimated transition matrix, shape (C, C); entry [i, j] is the probability that a sample of class i
            is labeled j. Shown for up to 40 classes.
        embed: number of embedded images.
        thumb_size: long side of the thumbnails in pixels; smaller images are not enlarged.

    Returns:
        The path of the page.

    Raises:
        OSError: if a file cannot be written.
        ValueError: if ``embed`` is negative or ``thumb_size`` is smaller than 1.
    """
    if embed < 0 or thumb_size < 1:
        raise ValueError(f"expected embed >= 0 and thumb_size >= 1, got {embed} and {thumb_size}; choose larger ones")
    folder = Path(folder)
    order = issues.order()
    embedded: list[str | None] = []
    if images is not None:
        for row in order[:embed].tolist():
            content = None if row in issues.unreadable else _jpeg(images, row, thumb_size)
            embedded.append(None if content is None else _data_uri(content))
    absolute = issues.paths is not None and all(_is_absolute(path) for path in issues.paths)
    thumbs = images is not None and (issues.paths is None or (root is None and not absolute))
    if thumbs and images is not None:
        ranked = list(enumerate(order.tolist(), start=1))[embed:]
        _write_thumbs(folder / "thumbs", issues, ranked, images, thumb_size)
    data = {
        **_columns(issues, order),
        "id": _identity(issues),
        "thumbs": thumbs,
        "bases": [] if root is None else _bases(folder, Path(root)),
        "embedded": embedded,
        "summary": _plain(summary),
        "transition": _matrix(transition, len(issues.class_names)),
    }
    page = folder / "report.html"
    with atomic_write(page) as file:
        file.write(_page(data).encode())
    return page


def _page(data: Mapping[str, Any]) -> str:
    template, style, script = (_template(f"report.{ending}") for ending in ("html", "css", "js"))
    script = f"\n{script.rstrip()}\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "script_hash": f"sha256-{digest}",
        "style": style.rstrip(),
        "script": script.strip("\n"),
        "data": _json(data),
    }
    pieces = template.split("{{")  # a single pass over the template: inserted text is not expanded
    return pieces[0] + "".join(
        parts[name] + rest for name, rest in (piece.split("}}", maxsplit=1) for piece in pieces[1:])
    )


def _template(name: str) -> str:
    return (files("sanm_lightning.audit") / "report_files" / name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """Return ASCII JSON that is safe inside HTML and JavaScript."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _columns(issues: LabelIssues, order: Array) -> dict[str, Any]:
    """Return the table as columns, by increasing quality; probabilities in millionths."""
    rows = order.tolist()
    readable = issues.readable[order]
    splits = list(dict.fromkeys(issues.splits))
    split_number = {name: i for i, name in enumerate(splits)}
    names = issues.names
    near = None
    if issues.neighbor_labels is not None:
        near = [[label for label in labels if label >= 0] for labels in issues.neighbor_labels[order].tolist()]

    def millionths(values: Array) -> list[int]:
        millionths: list[int] = np.rint(np.where(readable, values[order], 0) * 1e6).astype(np.int64).tolist()
        return millionths

    return {
        "key": "path" if issues.paths is not None else "index",
        "classes": list(issues.class_names),
        "splits": splits,
        "rows": {
            "name": [names[i] for i in rows],
            "split": [split_number[issues.splits[i]] for i in rows],
            "given": issues.given[order].tolist(),
            "suggested": np.where(readable, issues.suggested[order], -1).tolist(),
            "quality": millionths(issues.quality),
            "p_given": millionths(issues.p_given),
            "p_suggested": millionths(issues.p_suggested),
            "near": near,
            "unreadable": {place: issues.unreadable[i] for place, i in enumerate(rows) if i in issues.unreadable},
        },
    }


def _identity(issues: LabelIssues) -> str:
    """Return the storage key of the verdicts, which is identical for all audits of the same labels."""
    names = issues.names
    lines = sorted(
        json.dumps([name, split, issues.class_names[label]])
        for name, split, label in zip(names, issues.splits, issues.given.tolist(), strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _matrix(transition: Array | None, num_classes: int) -> list[list[float]] | None:
    if transition is None or num_classes > _MAX_MATRIX:
        return None
    rounded: list[list[float]] = _plain(np.round(np.asarray(transition, dtype=np.float64), 4))
    return rounded


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or path[1:3] == ":/"


def _bases(folder: Path, root: Path) -> list[str]:
    """Return URLs of ``root``: relative to the page, so that both can be moved together, and absolute."""
    absolute = root.resolve()
    found = [absolute.as_uri() + "/"]
    try:
        relative = Path(os.path.relpath(absolute, folder.resolve())).as_posix()
    except ValueError:  # on another drive
        return found
    return ["./" + quote(os.fsencode(relative)) + "/", *found]


def _jpeg(images: Images, row: int, side: int) -> bytes | None:
    """Return a JPEG thumbnail of the image of a row; None if the file no longer exists."""
    try:
        picture = Image.fromarray(images(row)).convert("RGB")
    except OSError:
        return None
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return content.getvalue()


def _data_uri(content: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def _write_thumbs(folder: Path, issues: LabelIssues, ranked: list[tuple[int, int]], images: Images, side: int) -> None:
    for rank, row in ranked:
        content = None if row in issues.unreadable else _jpeg(images, row, side)
        if content is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{rank}.jpg").write_bytes(content)


def _plain(value: Any) -> Any:
    """Convert mappings, sequences, NumPy values and numbers to JSON types; non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
