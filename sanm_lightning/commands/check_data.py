"""``sanm check-data``: decode every image once, and list what would stop or distort a training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.csv_tables import write_csv
from sanm_lightning.data import FromDataset, ImageFolder, NoisyDataModule
from sanm_lightning.data.decode import ImageFileList
from sanm_lightning.data.image_files import count_passed_over, name_passed_over, same_but_for_case
from sanm_lightning.data.image_folder import ScannedFiles
from sanm_lightning.data.left_out import BAD_FILES_HEADER, decode_errors
from sanm_lightning.processing import default_num_workers
from sanm_lightning.safe_files import require_folder

__all__ = ["check_data", "main"]

DEFAULT_OUT = "bad_files.csv"
SHOWN = 20
"""Maximum number of bad files that are printed."""


class _Split(NamedTuple):
    """What is checked of one split."""

    images: Any
    names: Sequence[str]
    labels: list[int]
    class_names: list[str]
    faults: list[tuple[str, str]]
    notes: list[str]


def check_data(
    root: str | None = None,
    data: L.LightningDataModule | None = None,
    out: str | None = None,
    num_workers: int | None = None,
) -> int:
    """Decode every image of all splits once, and write the bad files with the reasons to a CSV file.

    Bad are: files that cannot be decoded (truncated, empty, no images, of too many pixels), repeated paths, paths outside
    of the root, missing files, rows without path or label, labels and class folders unknown in training, classes without
    images or without readable images, and folders that cannot be read. Skipped files, such as hidden ones, and names
    that differ in case only are printed, but are not bad. ``--data.bad_files`` of `ImageFolder` and `CSVImages` leaves
    out the listed images.

    Args:
        root: folder that contains class folders, or ``train/`` (``val/``, ``test/``) with class folders.
        data: data module, instead of a folder, such as ``CSVImages``.
        out: output CSV file with the columns ``path`` and ``reason``; an existing file is replaced. Default:
            ``bad_files.csv``, which is not created if nothing is bad.
        num_workers: number of worker processes that decode images. Default: one per CPU, up to four, none for one CPU.

    Returns:
        Exit status: 0 if nothing is bad and there are two or more classes, otherwise 1.

    Raises:
        ValueError: if an argument is out of range, or the data set has no classes or no table.
        OSError: if the data set does not exist, or the file cannot be written.
    """
    if (root is None) == (data is None):
        got = "neither" if root is None else "both"
        raise ValueError(
            f"expected a folder or a data module, got {got}; use 'sanm check-data ROOT' or 'sanm check-data --data CLASS'"
        )
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"expected num_workers of 0 or more, got {num_workers}; use 0 for none")
    require_folder(Path(out or DEFAULT_OUT).absolute().parent)
    checked: Any = ImageFolder(root, image_size=1) if root is not None else data
    if not isinstance(checked, NoisyDataModule):
        raise ValueError(
            f"expected a data module with labels by index, got {type(checked).__name__}; use a subclass of "
            "NoisyDataModule, or a folder"
        )
    checked.prepare_data()
    console = Console(highlight=False, soft_wrap=True)
    workers = default_num_workers() if num_workers is None else num_workers
    bad: list[tuple[str, str]] = []
    one_class = False
    for name in ("train", *checked.own_splits):
        split = _listed(checked, name)
        reasons = dict(_decoded(split, name, workers, console))
        found = [*split.faults, *((split.names[row], reason) for row, reason in reasons.items())]
        found += [(label, f"class without readable images in {name}") for label in _emptied(split, reasons)]
        console.print(
            f"{name}: {len(split.names)} images of {len(set(split.labels))} classes, {len(found)} bad", markup=False
        )
        for note in split.notes:
            console.print(f"{name}: {note}", markup=False)
        bad += found
        one_class |= name == "train" and len(split.class_names) < 2
    if bad or out is not None or Path(DEFAULT_OUT).exists():  # an earlier list would be out of date
        write_csv(out or DEFAULT_OUT, BAD_FILES_HEADER, bad)
    for path, reason in bad[:SHOWN]:
        console.print(f"bad: {path} ({reason})", markup=False)
    more = f", {len(bad) - SHOWN} of them not shown" if len(bad) > SHOWN else ""
    console.print(f"{len(bad)} bad files or rows{more}: {out or DEFAULT_OUT}" if bad else "no bad files", markup=False)
    if one_class:
        console.print("one class only; training requires two", markup=False)
    return int(bool(bad) or one_class)


def _listed(data: Any, split: str) -> _Split:
    """List the images of a split, with the faults that a listing shows."""
    if not isinstance(data, ScannedFiles):
        source = data.complete_source(split) if isinstance(data, FromDataset) else getattr(data, f"load_{split}")()
        names = source.paths or [f"{split} {row}" for row in range(len(source.labels))]
        return _Split(source.images, names, source.labels.tolist(), data.class_names, [], [])
    found = data.listing(split)
    pairs = [*same_but_for_case(found.class_names if split == "train" else []), *same_but_for_case(found.paths)]
    notes = [f"{one!r} and {other!r} differ in case only" for one, other in pairs[:SHOWN]]
    if found.passed_over:
        notes.append(count_passed_over(found.passed_over))
        notes.append(name_passed_over(found.passed_over, Path(data.root)))
    faults = [(fault.path, fault.reason) for fault in found.faults]
    images = ImageFileList(found.files, data.image_size[0], data.channels, data.resize)
    return _Split(images, found.paths, found.labels, found.class_names, faults, notes)


def _decoded(split: _Split, name: str, num_workers: int, console: Console) -> Iterator[tuple[int, str]]:
    """Decode the images of a split with a progress bar, and yield the bad rows with their reasons."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=len(split.names))
        for row, reason in decode_errors(split.images, range(len(split.names)), num_workers):
            bar.advance(task)
            if reason:
                yield row, reason


def _emptied(split: _Split, bad: dict[int, str]) -> list[str]:
    """Return the names of the classes whose images are all bad."""
    readable = {label for row, label in enumerate(split.labels) if row not in bad}
    return [split.class_names[label] for label in sorted(set(split.labels) - readable)]


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm check-data``, run it and return the exit status."""
    parser = CommandParser(
        prog="sanm check-data", description="Decode every image once, and list bad files in a CSV file."
    )
    parser.add_argument(
        "root", nargs="?", type=str | None, default=None, help="folder that contains class folders or split folders"
    )
    parser.add_function_arguments(check_data, skip={"root", "data"}, as_group=False, sub_configs=True)
    parser.add_subclass_arguments(
        L.LightningDataModule, "data", required=False, help="data module, instead of a folder"
    )
    parsed = parser.instantiate_classes(parser.parse_args(words))
    return check_data(**{key: value for key, value in parsed.as_dict().items() if key != "config"})
