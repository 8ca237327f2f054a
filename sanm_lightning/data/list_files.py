"""Read text files that list the images of a data set, of any length, without one Python object per image."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

__all__ = ["Listed", "PathList", "join_labels", "keep_present", "read_keys", "read_pairs", "without_prefix"]

Array = np.ndarray[Any, Any]

LINES_AT_ONCE = 2**16
"""Lines that are parsed at once; bounds the memory for Python objects."""


class Listed(NamedTuple):
    """Images of a list file.

    Attributes:
        paths: paths relative to a folder, shape (N,), bytes.
        labels: class indices, shape (N,), int64.
    """

    paths: Array
    labels: Array


class PathList(Sequence[str]):
    """Sequence of paths, stored in one array of bytes; ``str`` objects are created on access.

    Args:
        names: paths, shape (N,), bytes.
        prefix: text that each path begins with.
    """

    def __init__(self, names: Array, prefix: str = "") -> None:
        self.names, self.prefix = names, prefix

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "PathList": ...

    def __getitem__(self, index: int | slice) -> "str | PathList":
        if isinstance(index, slice):
            return PathList(self.names[index], self.prefix)
        return self.prefix + os.fsdecode(bytes(self.names[index]))

    def at(self, rows: Array) -> "PathList":
        """Select paths by position, shape (n,)."""
        return PathList(self.names[rows], self.prefix)


def read_keys(path: Path) -> Array:
    """Read a file with one path per line, shape (N,), bytes; blank lines are ignored.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it has no lines.
    """
    return _joined(path, [_array([line for line in part if line]) for part in _parts(path)])


def read_pairs(path: Path, num_classes: int, below: bool = False, header: bytes | None = None) -> Listed:
    """Read a file of lines ``path label``; paths may contain spaces, and blank lines are ignored.

    Args:
        path: path of the file.
        num_classes: C; labels are in [0, C).
        below: whether to ignore lines with larger labels instead of refusing them.
        header: beginning of a first line to ignore.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a line has another form, a label is out of range, or there are no lines.
    """
    paths, labels = [], []
    for number, part in enumerate(_parts(path)):
        if number == 0 and header is not None and part[0].startswith(header):
            part[0] = b""
        pairs = [line.rsplit(None, 1) for line in part]
        broken = [
            i for i, pair in enumerate(pairs) if pair and not (len(pair) == 2 and pair[1].removeprefix(b"-").isdigit())
        ]
        if broken:
            raise ValueError(
                f"expected lines 'path label' in {str(path)!r}, got another line {number * LINES_AT_ONCE + broken[0] + 1}, "
                f"{os.fsdecode(part[broken[0]])[:80]!r}; correct or remove it"
            )
        pairs = [pair for pair in pairs if pair]
        found = np.array([int(pair[1]) for pair in pairs], dtype=np.int64)
        outside = (found < 0) | (found >= num_classes)
        wrong = np.flatnonzero(found < 0 if below else outside)
        if len(wrong):
            raise ValueError(
                f"expected labels in 0 to {num_classes - 1} in {str(path)!r}, got {found[wrong[0]]} for "
                f"{os.fsdecode(pairs[wrong[0]][0])!r}; correct or remove the line"
            )
        names = _array([pair[0] for pair in pairs])
        paths.append(names[~outside])
        labels.append(found[~outside])
    return Listed(_joined(path, paths), np.concatenate(labels))


def join_labels(keys: Array, table: Listed, keys_file: Path, table_file: Path) -> Array:
    """Return the label of each key, (N,) int64, from a table in another order.

    Args:
        keys: paths, shape (N,), bytes.
        table: paths with labels; may contain further paths.
        keys_file: file of the keys, for error messages.
        table_file: file of the table, for error messages.

    Raises:
        ValueError: if a key is not in the table, or the table has two labels for a path.
    """
    order = np.argsort(table.paths, kind="stable")
    names, labels = table.paths[order], table.labels[order]
    twice = np.flatnonzero((names[1:] == names[:-1]) & (labels[1:] != labels[:-1]))
    if len(twice):
        raise ValueError(
            f"expected one label per path in {str(table_file)!r}, got two for {os.fsdecode(bytes(names[twice[0]]))!r}; "
            "correct the file"
        )
    place = np.searchsorted(names, keys).clip(max=len(names) - 1)
    missing = np.flatnonzero(names[place] != keys)
    if len(missing):
        raise ValueError(
            f"expected a label in {str(table_file)!r} for each of the {len(keys)} paths in {str(keys_file)!r}, got "
            f"{len(missing)} without one (first: {os.fsdecode(bytes(keys[missing[0]]))!r}); use both files of one release"
        )
    found: Array = labels[place]
    return found


def without_prefix(paths: Array, prefix: bytes) -> Array:
    """Remove a prefix from the paths that begin with it, shape (N,), bytes."""
    begins = np.char.startswith(paths, prefix)
    if not begins.any():
        return paths
    shorter = paths.copy()
    width = paths.dtype.itemsize
    characters = np.ascontiguousarray(paths[begins]).view(np.uint8).reshape(-1, width)[:, len(prefix) :]
    shorter[begins] = np.ascontiguousarray(characters).view(f"S{width - len(prefix)}")[:, 0]
    return shorter


def keep_present(listed: Listed, root: Path, listing: str, skip_missing: bool, where: str) -> tuple[Listed, list[str]]:
    """Check that the listed files exist below a root, each listed once; each folder is listed once, no file is opened.

    Args:
        listed: paths relative to the root, with labels.
        root: folder of the images.
        listing: name of the list, for error messages.
        skip_missing: whether to leave out missing files instead of refusing them.
        where: where to get the files, for error messages.

    Returns:
        The images to use, in the order of the list, and phrases on the ones left out.

    Raises:
        FileNotFoundError: if files are missing.
        ValueError: if a path leaves the root.
    """
    order = np.argsort(listed.paths, kind="stable")
    present = np.ones(len(order), dtype=bool)
    folder: bytes | None = None
    names: set[bytes] = set()
    for first in range(0, len(order), LINES_AT_ONCE):
        rows = order[first : first + LINES_AT_ONCE]
        for row, path in zip(rows.tolist(), listed.paths[rows].tolist(), strict=True):
            own, _, name = path.rpartition(b"/")
            if own != folder:
                folder, names = own, _names(root, own)
            present[row] = name in names
    ordered = listed.paths[order]
    again = np.zeros(len(order), dtype=bool)
    again[order[1:][ordered[1:] == ordered[:-1]]] = True
    missing = np.flatnonzero(~present)
    said = []
    if len(missing):
        example = os.fsdecode(bytes(listed.paths[missing[0]]))
        if not skip_missing or len(missing) == len(present):
            raise FileNotFoundError(
                f"expected the {len(present)} images of {listing} in {str(root)!r}, got {len(missing)} missing files "
                f"(first: {example!r}); unpack {where} there, or set --data.skip_missing true to leave them out"
            )
        said.append(f"{len(missing)} missing files left out (first: {example!r})")
    if again.any():
        example = os.fsdecode(bytes(listed.paths[np.flatnonzero(again)[0]]))
        said.append(f"{int(again.sum())} paths listed again left out (first: {example!r})")
    kept = present & ~again
    return (listed if kept.all() else Listed(listed.paths[kept], listed.labels[kept])), said


def _names(root: Path, folder: bytes) -> set[bytes]:
    """Return the names in a folder below the root; an empty set if it does not exist."""
    if folder.startswith(b"/") or b".." in folder.split(b"/"):
        raise ValueError(
            f"expected paths inside of {str(root)!r}, got one in {os.fsdecode(folder)!r}; correct the list of images"
        )
    try:
        return set(os.listdir(os.path.join(os.fsencode(root), folder)))
    except OSError:
        return set()


def _parts(path: Path) -> Iterator[list[bytes]]:
    """Iterate over the stripped lines of a file in parts of :data:`LINES_AT_ONCE` lines."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a list of images in {str(path)!r}, got no such file; check the root")
    with path.open("rb") as file:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
        while part := list(itertools.islice(lines, LINES_AT_ONCE)):
            yield part


def _array(names: list[bytes]) -> Array:
    return np.array(names, dtype=np.bytes_) if names else np.empty(0, dtype="S1")


def _joined(path: Path, parts: list[Array]) -> Array:
    if not any(map(len, parts)):
        raise ValueError(f"expected one image per line in {str(path)!r}, got none; check the file")
    found: Array = np.concatenate(parts)
    return found
