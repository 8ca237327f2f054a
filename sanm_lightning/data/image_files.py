"""List the image files of a folder, and the skipped files with reasons, without decoding."""

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
    "name_passed_over",
    "same_but_for_case",
    "split_folders",
]

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test",
}  # fmt: skip
"""Splits by name of a folder or cell, in lower case."""

SPLITS = ("train", "val", "test")
ABOVE = "link to a folder above"
NAMED = 10
"""Maximum number of skipped files in a log line."""
LAYOUT = "use the layout ROOT/<class>/, or ROOT/train/<class>/ with optional ROOT/val/<class>/ and ROOT/test/<class>/"

PassedOver = dict[str, list[Path]]
"""Skipped files by reason."""


class ClassFolder(NamedTuple):
    """The files of one class folder.

    Attributes:
        files: image files in the folder, found recursively, sorted by relative path with ``/``.
        passed_over: skipped files by reason, sorted likewise; folders whose files are not listed are included as a
            whole.
    """

    files: list[Path]
    passed_over: PassedOver


class ImageListing(NamedTuple):
    """The image files of a root; row i of every attribute is file i.

    Attributes:
        paths: N paths relative to the root, sorted by split (train, val, test), class and path.
        splits: ``train``, ``val`` or ``test``; ``all`` if the root has no split folders.
        labels: class indices, shape (N,), int64.
        class_names: names of the C class folders of all splits, sorted; classes may have no images.
        passed_over: skipped files by reason, relative to the root.
    """

    paths: list[Path]
    splits: list[str]
    labels: Tensor
    class_names: list[str]
    passed_over: PassedOver


def list_class_folder(folder: str | Path) -> ClassFolder:
    """List the image files of a folder recursively.

    Links to files and folders are followed; a folder that is reached a second time is not listed again, nor one that
    contains a folder already entered, which would add the images of other classes. Skipped are
    files with extensions that Pillow cannot open, files without an extension, hidden files and the content of hidden
    folders, broken links, and special files.

    Args:
        folder: path of the folder.

    Raises:
        OSError: if the folder cannot be read.
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
                if os.path.realpath(entry) in seen:
                    reason = "folder listed before"
                elif _contains(entry, folder):
                    reason = ABOVE
                else:
                    _walk(entry.path, covered, files, passed_over, seen, endings)
                    continue
            except OSError:
                reason = "folder that cannot be read"
        elif covered:
            reason = "hidden"
        if reason is None:
            files.append(Path(entry.path))
        else:
            passed_over.setdefault(reason, []).append(Path(entry.path))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name, folders before links, so that files have the path of their own folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    except PermissionError as error:
        raise PermissionError(
            f"expected a readable folder in {str(folder)!r}, got {error.strerror}; change its permissions, or remove it"
        ) from error


def _reason(entry: os.DirEntry[str], endings: set[str]) -> str | None:
    """Return why an entry is skipped, by its kind and name; ``folder`` for folders, None for images."""
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "broken link" if entry.is_symlink() and not os.path.exists(entry) else "not a file"
    except OSError:  # a link to itself
        return "broken link"
    ending = os.path.splitext(entry.name)[1].lower()
    if not ending:
        return "no extension"
    return None if ending in endings else f"extension {ending} unknown to Pillow"


def _contains(entry: os.DirEntry[str], folder: str | Path) -> bool:
    """Return whether an entry of a folder is a link to that folder, or to one that contains it."""
    return entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(entry.path).resolve())


def _endings() -> set[str]:
    known = Image.registered_extensions()  # fills Image.OPEN; plug-ins may extend both at any time
    return {ending for ending, kind in known.items() if kind in Image.OPEN}


def count_passed_over(passed_over: Mapping[str, Iterable[Path]]) -> str:
    """Return a phrase such as ``3 files skipped (2 hidden, 1 no extension)``; an empty string if there are none."""
    counts = {reason: len(list(paths)) for reason, paths in sorted(passed_over.items())}
    total = sum(counts.values())
    if total == 0:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return f"{total} file{'s' if total > 1 else ''} skipped ({reasons})"


def name_passed_over(passed_over: Mapping[str, Iterable[Path]], root: Path) -> str:
    """Return a phrase such as ``skipped a/notes.txt, a/.b and 3 more``; paths are relative to the root."""
    paths = [
        path.relative_to(root) if path.is_relative_to(root) else path for part in passed_over.values() for path in part
    ]
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return f"skipped {', '.join(path.as_posix() for path in paths[:NAMED])}{more}"


def same_but_for_case(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of paths that are equal except for upper and lower case; file systems without case keep one of them."""
    seen: dict[str, str] = {}
    pairs = []
    for path in paths:
        other = seen.setdefault(path.lower(), path)
        if other != path:
            pairs.append((other, path))
    return pairs


def class_folders(folder: str | Path, required: bool = True) -> tuple[list[str], PassedOver]:
    """Return the sorted names of the class folders in a folder, and the other files in it by reason.

    Args:
        folder: folder of one split.
        required: whether to raise an error if there are no class folders.

    Raises:
        FileNotFoundError: if the folder does not exist.
        NotADirectoryError: if it is a file.
        ValueError: if class folders are required and there are none.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(
            f"expected a folder of class folders in {str(folder)!r}, got a file; use a folder, or --data CSVImages "
            "--data.file FILE for a table"
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected a folder of class folders in {str(folder)!r}, got no such folder; check the path, {LAYOUT}"
        )
    names, loose = [], PassedOver()
    endings = _endings()
    for entry in _entries(folder):
        reason = "hidden" if entry.name.startswith(".") else _reason(entry, endings)
        if reason == "folder" and _contains(entry, folder):
            reason = ABOVE
        if reason == "folder":
            names.append(entry.name)
        else:
            loose.setdefault(reason or "in no class folder", []).append(Path(entry.path))
    names.sort()
    if required and not names:
        raise ValueError(f"expected class folders in {str(folder)!r}, got none; {LAYOUT}")
    return names, loose


def split_folders(root: str | Path, required: bool = True) -> tuple[dict[str, list[Path]], PassedOver]:
    """Find the split folders in a root.

    A root has splits if it contains a folder ``train``, unless there are other class folders and ``train`` looks like one
    of them: it contains images and at most one folder. Split folders have the names of :data:`SPLIT_NAMES`, in any case.

    Args:
        root: folder that contains class folders or split folders.
        required: whether to raise an error if there are other split folders but no ``train``.

    Returns:
        The folders of ``train``, ``val`` and ``test`` that exist, or the root itself as ``all``; and the other entries
        of a root with splits, by reason.

    Raises:
        FileNotFoundError: if the root does not exist, or the required folder ``train``.
        ValueError: if the root contains no folders.
    """
    root = Path(root)
    folders, passed_over = class_folders(root)
    others = [name for name in folders if name.lower() not in SPLIT_NAMES]
    bases = {split: [root / name for name in folders if SPLIT_NAMES.get(name.lower()) == split] for split in SPLITS}
    if not bases["train"] and not others and required:
        raise FileNotFoundError(f"expected a folder 'train' in {str(root)!r}, got only {', '.join(folders)}; {LAYOUT}")
    if others and all(map(_looks_like_a_class, bases["train"])):
        return {"all": [root]}, {}
    parts = {split: part for split, part in bases.items() if part}
    return parts, {**passed_over, **({"folder of no split": [root / name for name in others]} if others else {})}


def _looks_like_a_class(folder: Path) -> bool:
    """Return whether a folder contains images and at most one folder; more folders are classes beside loose images."""
    endings = _endings()
    kinds = [_reason(entry, endings) for entry in _entries(folder) if not entry.name.startswith(".")]
    return None in kinds and kinds.count("folder") <= 1


def list_images(root: str | Path) -> ImageListing:
    """List the images of a root of class folders, or of ``train`` (and ``val``, ``test``) with class folders.

    Classes are matched by name over all splits; a class may be missing from a split, or have no images. Images outside
    of class folders are skipped. For the layout see :func:`split_folders`.

    Args:
        root: path of the root.

    Raises:
        FileNotFoundError: if the root does not exist, or has other split folders but no ``train``.
        ValueError: if there are no class folders, or fewer than two classes with images.
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
            f"({count_passed_over(passed_over) or 'no files skipped'}); {LAYOUT}"
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
    """Add skipped files to a mapping, in place."""
    for reason, paths in more.items():
        passed_over.setdefault(reason, []).extend(paths)
