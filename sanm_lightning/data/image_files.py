"""Which files of a folder are images, and which are passed over and why. Nothing is decoded."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "SPLIT_NAMES",
    "ClassFolder",
    "ImageListing",
    "add_passed_over",
    "class_folders",
    "count_passed_over",
    "list_class_folder",
    "list_images",
    "split_folders",
]

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""The split that a folder or a cell of this name (in lower case) means."""

SPLITS = ("train", "val", "test")
LAYOUT = "put images in ROOT/<class>/, or in ROOT/train/<class>/ and, if there are any, ROOT/val/ and ROOT/test/"

PassedOver = dict[str, list[Path]]
"""Files that are no images, by reason."""


class ClassFolder(NamedTuple):
    """The files of one folder.

    Attributes:
        files: image files, below the folder, sorted by their path relative to it with ``/``.
        passed_over: other files by reason, sorted likewise; whole folders where their files are not listed.
    """

    files: list[Path]
    passed_over: PassedOver


class ImageListing(NamedTuple):
    """The image files of a root; row i of every part is file i.

    Attributes:
        paths: relative to the root, N of them: by split (train, val, test), class and path.
        splits: ``train``, ``val`` or ``test``; ``all`` where the root has no folders of splits.
        labels: class indices, shape (N,), int64.
        class_names: names of the C class folders of all splits together, sorted; a class may be without images.
        passed_over: paths relative to the root by reason.
    """

    paths: list[Path]
    splits: list[str]
    labels: Tensor
    class_names: list[str]
    passed_over: PassedOver


def list_class_folder(folder: str | Path) -> ClassFolder:
    """List the image files of a folder and of all folders in it.

    Links are followed, to files and to folders; a folder that is reached a second time is not listed again. Passed over are
    files whose ending Pillow cannot open, files without an ending, hidden files and what hidden folders hold, broken links,
    and what is neither a file nor a folder.

    Args:
        folder: where to begin.

    Raises:
        OSError: the folder itself cannot be read.
    """
    files: list[Path] = []
    passed_over: PassedOver = {}
    _walk(str(folder), False, files, passed_over, set(), _endings())
    return ClassFolder(
        sorted(files, key=Path.as_posix), {why: sorted(paths, key=Path.as_posix) for why, paths in passed_over.items()}
    )


def _walk(
    folder: str, hidden: bool, files: list[Path], passed_over: PassedOver, seen: set[str], endings: set[str]
) -> None:
    seen.add(os.path.realpath(folder))
    for entry in _entries(folder):
        covered = hidden or entry.name.startswith(".")
        reason = _reason(entry, endings)
        if reason == "folder":
            try:
                if os.path.realpath(entry) not in seen:
                    _walk(entry.path, covered, files, passed_over, seen, endings)
                    continue
                reason = "folder listed before"
            except OSError:
                reason = "folder that cannot be read"
        elif covered:
            reason = "hidden"
        if reason is None:
            files.append(Path(entry.path))
        else:
            passed_over.setdefault(reason, []).append(Path(entry.path))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; true folders before links to them, so that a file has the path of its own folder."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))


def _reason(entry: os.DirEntry[str], endings: set[str]) -> str | None:
    """Say why something is no image, by its kind and name: ``folder``, or another reason; None where it is one."""
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "broken link" if entry.is_symlink() and not os.path.exists(entry) else "not a file"
    except OSError:  # a link to itself
        return "broken link"
    ending = os.path.splitext(entry.name)[1].lower()
    if not ending:
        return "no ending"
    return None if ending in endings else f"ending {ending} unknown to Pillow"


def _endings() -> set[str]:
    known = Image.registered_extensions()  # fills Image.OPEN; a plug-in may add to both at any time
    return {ending for ending, kind in known.items() if kind in Image.OPEN}


def count_passed_over(passed_over: Mapping[str, Iterable[Path]]) -> str:
    """Return a phrase such as ``3 files passed over (2 hidden, 1 no ending)``; empty where there are none."""
    counts = {reason: len(list(paths)) for reason, paths in sorted(passed_over.items())}
    total = sum(counts.values())
    if total == 0:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{total} file{'s' if total > 1 else ''} passed over ({reasons})"


def class_folders(folder: str | Path, required: bool = True) -> tuple[list[str], PassedOver]:
    """Return the names of the class folders in a folder, sorted, and the files that lie beside them.

    Args:
        folder: of one split.
        required: whether there must be class folders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder of class folders in {str(folder)!r}, got none; check the path, {LAYOUT}"
        )
    names, loose = [], PassedOver()
    endings = _endings()
    for entry in _entries(folder):
        reason = "hidden" if entry.name.startswith(".") else _reason(entry, endings)
        if reason == "folder":
            names.append(entry.name)
        else:
            loose.setdefault(reason or "in no class folder", []).append(Path(entry.path))
    names.sort()
    if required and not names:
        raise ValueError(f"expected class folders in {str(folder)!r}, got none; {LAYOUT}")
    return names, loose


def split_folders(root: str | Path) -> tuple[dict[str, list[Path]], PassedOver]:
    """Find the folders of the splits in a root.

    The root has splits where it has a folder ``train``, unless that holds images of its own beside other class folders.

    Args:
        root: of class folders, or of folders of splits.

    Returns:
        The folders of ``train``, ``val`` and ``test``, those that are there; or of ``all``, which is the root itself. And what
        else lies in a root of splits, by reason.

    Raises:
        FileNotFoundError: there is no such folder, or it has folders of other splits and no ``train``.
        ValueError: it holds no folders.
    """
    root = Path(root)
    folders, passed_over = class_folders(root)
    others = [name for name in folders if name not in SPLIT_NAMES]
    if "train" not in folders and not others:
        raise FileNotFoundError(f"expected a folder 'train' in {str(root)!r}, got {', '.join(folders)} alone; {LAYOUT}")
    endings = _endings()
    if "train" not in folders or (
        others and any(_reason(entry, endings) is None for entry in _entries(root / "train"))
    ):
        return {"all": [root]}, {}
    parts: dict[str, list[Path]] = {}
    for split in SPLITS:
        if bases := [root / name for name in folders if SPLIT_NAMES.get(name) == split]:
            parts[split] = bases
    return parts, {**passed_over, **({"folder of no split": [root / name for name in others]} if others else {})}


def list_images(root: str | Path) -> ImageListing:
    """List the images of a root of class folders, or of ``train`` (and ``val``, ``test``), each of class folders.

    Classes are matched by name over all splits; a class may be missing from a split, or be without images. Images that lie in
    no class folder are passed over. For the layout see :func:`split_folders`.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: there is no such folder, or it has folders of other splits and no ``train``.
        ValueError: there are no class folders or no images, or images of one class only.
    """
    root = Path(root)
    parts, passed_over = split_folders(root)
    found: list[tuple[Path, str, str]] = []
    names: set[str] = set()
    for split, bases in parts.items():
        for base in bases:
            classes, loose = class_folders(base, required=split in ("all", "train"))
            add_passed_over(passed_over, loose)
            names.update(classes)
            for name in classes:
                files, others = list_class_folder(base / name)
                found += [(path, split, name) for path in files]
                add_passed_over(passed_over, others)
    filled = {name for _, _, name in found}
    if len(filled) < 2:
        raise ValueError(
            f"expected images of two or more classes in {str(root)!r}, got {len(found)} of {len(filled)} "
            f"({count_passed_over(passed_over) or 'no file was passed over'}); {LAYOUT}"
        )
    class_names = sorted(names)
    number = {name: label for label, name in enumerate(class_names)}
    return ImageListing(
        [path.relative_to(root) for path, _, _ in found],
        [split for _, split, _ in found],
        torch.tensor([number[name] for _, _, name in found]),
        class_names,
        {reason: [path.relative_to(root) for path in paths] for reason, paths in passed_over.items()},
    )


def add_passed_over(passed_over: PassedOver, more: PassedOver) -> None:
    """Add what was passed over elsewhere, in place."""
    for reason, paths in more.items():
        passed_over.setdefault(reason, []).extend(paths)
