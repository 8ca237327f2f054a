"""Leave out samples whose images cannot be decoded, before labels and splits are made."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sanm_lightning.csv_tables import read_csv
from sanm_lightning.data.decode import unreadable_reason
from sanm_lightning.data.rows import ImageDataset
from sanm_lightning.data.source import Source

__all__ = ["BAD_FILES_HEADER", "decode_errors", "leave_out", "listed_bad_files", "name_bad", "unreadable_rows"]

BAD_FILES_HEADER = ["path", "reason"]
"""Columns of ``bad_files.csv``."""

NAMED = 10
"""Maximum number of files in a log line."""


class _Probe(Dataset[tuple[int, str]]):
    """Data set of (row, reason); the reason is empty if the image is decoded. Runs in the workers."""

    def __init__(self, images: ImageDataset, rows: Sequence[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[int, str]:
        row = self.rows[place]
        try:
            self.images[row]
        except ValueError as error:
            return row, unreadable_reason(error)
        return row, ""


def decode_errors(images: ImageDataset, rows: Sequence[int], num_workers: int = 0) -> Iterator[tuple[int, str]]:
    """Decode images once, and yield their rows in order with the reason of the error, which is empty if there is none.

    Args:
        images: a data set whose items raise ValueError if they cannot be decoded.
        rows: rows to decode.
        num_workers: number of worker processes.
    """
    loader: Any = DataLoader(_Probe(images, rows), batch_size=16, num_workers=num_workers, collate_fn=list)
    for items in loader:
        yield from items


def unreadable_rows(images: ImageDataset, num_workers: int = 0, known: Collection[int] = ()) -> dict[int, str]:
    """Decode all images, and return the reasons of those that cannot be decoded, by row.

    Args:
        images: a data set whose items raise ValueError if they cannot be decoded.
        num_workers: number of worker processes.
        known: rows that are not decoded.
    """
    rows = [row for row in range(len(images)) if row not in known]
    return {row: reason for row, reason in decode_errors(images, rows, num_workers) if reason}


def listed_bad_files(path: str) -> dict[str, str]:
    """Return the paths listed in ``bad_files.csv``, relative to the root of the data set, with their reasons.

    Args:
        path: file written by ``sanm check-data``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it has other columns.
    """
    return {row[0]: row[1] for row in read_csv(path, [BAD_FILES_HEADER])[1]}


def name_bad(bad: Sequence[tuple[str, str]]) -> str:
    """Return paths with their reasons for a log line, up to :data:`NAMED`, and the number of the others."""
    named = ", ".join(f"{path} ({reason})" for path, reason in bad[:NAMED])
    return named + (f" and {len(bad) - NAMED} more; sanm check-data lists all" if len(bad) > NAMED else "")


def leave_out(
    source: Source, bad: Mapping[int, str], class_names: Sequence[str], split: str, say: Callable[[str], None]
) -> Source:
    """Remove samples from a data set, and log their number and names.

    Args:
        source: the data set.
        bad: reasons by row; empty returns the data set.
        class_names: names of the classes.
        split: name of the split for messages.
        say: function called with a line to log.

    Raises:
        ValueError: if no sample of a class is left in the training set, or none at all.
    """
    if not bad:
        return source
    kept = [row for row in range(len(source.labels)) if row not in bad]
    emptied = set(source.labels.tolist()) - set(source.labels[kept].tolist())
    if emptied and (split == "train" or not kept):
        raise ValueError(
            f"expected readable images of every class in the {split} split, got none of "
            f"{', '.join(repr(class_names[label]) for label in sorted(emptied))}; replace the files, or remove the classes"
        )
    names = source.paths or [f"sample {row}" for row in range(len(source.labels))]
    named = name_bad([(names[row], reason) for row, reason in sorted(bad.items())])
    say(f"{split}: {len(bad)} of {len(source.labels)} images left out as bad: {named}")
    paths = None if source.paths is None else [source.paths[row] for row in kept]
    true = None if source.true_labels is None else source.true_labels[kept]
    left_out = () if source.paths is None else tuple(source.paths[row] for row in bad)
    return Source(source.labels[kept], _Part(source.images, kept), paths, true, left_out)


class _Part:
    """Map-style data set of some rows of another one."""

    def __init__(self, images: Tensor | ImageDataset, rows: Sequence[int]) -> None:
        self.images, self.rows = images, torch.tensor(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.rows[index])]
