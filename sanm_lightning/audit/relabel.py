"""Correct labels from verdicts or suggestions, in a new label file or linked folder; originals are not modified."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sanm_lightning.audit.label_issues import LabelIssues, read_label_issues
from sanm_lightning.audit.sets import refuse_class_folder
from sanm_lightning.audit.verdicts import apply_accepted, apply_suggestions, by_index
from sanm_lightning.csv_tables import write_csv
from sanm_lightning.safe_files import atomic_write

__all__ = ["Relabeled", "relabel", "undo_relabel"]

LABELS_HEADER = ["path", "label", "drop"]
CHANGES_HEADER = ["path", "old_label", "new_label", "drop"]
RECORD = "relabel.json"

Array = np.ndarray[Any, Any]


class Relabeled(NamedTuple):
    """Result of :func:`relabel`.

    Attributes:
        path: the label file or the linked folder.
        num_samples: number of samples, including those of the original training set that were not audited.
        num_changed: number of samples with a new label.
        num_dropped: number of dropped samples.
    """

    path: Path
    num_samples: int
    num_changed: int
    num_dropped: int

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.num_samples} samples, {self.num_changed} with a new label, {self.num_dropped} dropped; undo "
            f"with sanm relabel --undo {self.path}"
        )


def relabel(
    audit_folder: str | Path,
    accepted: str | Path | None = None,
    below: float | None = None,
    min_p_suggested: float = 0.0,
    out: str | Path | None = None,
    linked: str | Path | None = None,
    root: str | Path | None = None,
    ambiguous: str = "keep",
    new_classes: bool = False,
    overwrite: bool = False,
) -> Relabeled:
    """Write the corrected labels of an audited data set; the originals are not modified.

    The changes are listed in ``changes.csv``, and ``relabel.json`` contains the data required for an undo.

    Args:
        audit_folder: folder written by ``sanm audit``.
        accepted: file of verdicts: samples marked wrong receive their new label, samples marked drop are dropped.
        below: instead of ``accepted``: samples with at most this quality, in [0, 1], receive the suggested label.
        min_p_suggested: minimum probability of the suggested label of these samples, in [0, 1].
        out: label file to write, such as ``labels.csv``, with the columns path (or index), label and drop.
        linked: instead of ``out``: folder to write, with a link to each image file under split and class.
        root: folder that the paths of the audit are relative to, for ``linked``; default: the audited folder.
        ambiguous: ``keep`` keeps samples marked ambiguous unchanged, ``drop`` drops them.
        new_classes: whether new labels may be classes that are not in the data set. Training on class folders then requires
            ``linked``, because their classes are the folders.
        overwrite: whether ``out`` may replace a label file; no other files are replaced.

    Raises:
        OSError: if a file cannot be read or written, or already exists.
        ValueError: if the options are contradictory, or the verdicts do not belong to this audit. No file is written.
    """
    if (accepted is None) == (below is None):
        what = "neither" if accepted is None else "both"
        raise ValueError(f"expected either --accepted FILE or --below QUALITY, got {what}; give one")
    if (out is None) == (linked is None):
        what = "neither" if out is None else "both"
        raise ValueError(f"expected either --out FILE or --linked FOLDER, got {what}; give one")
    if ambiguous not in ("keep", "drop"):
        raise ValueError(f"expected ambiguous to be keep or drop, got {ambiguous!r}; give one of them")
    for name, value, example in (("below", below, 0.1), ("min_p_suggested", min_p_suggested, 0.5)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"expected {name} in [0, 1], got {value}; use {example}")
    issues, dropped = _read_audit(Path(audit_folder))
    if accepted is not None:
        labels, drop = apply_accepted(issues, accepted, ambiguous == "drop", new_classes)
    else:
        labels, drop = apply_suggestions(issues, below or 0.0, min_p_suggested)
    drop = [now or before for now, before in zip(drop, dropped, strict=True)]
    given = [issues.class_names[label] for label in issues.given.tolist()]
    changed = sum(new != old for new, old in zip(labels, given, strict=True))
    if out is not None:
        path, source = Path(out), _recorded_root(Path(audit_folder)) if root is None else root
        if source is not None:
            refuse_class_folder(path.parent, Path(source), issues.paths, issues.class_names, "--out")
        _write_labels(path, issues, given, labels, drop, overwrite)
    else:
        assert linked is not None
        path, images = Path(linked), _find_root(Path(audit_folder), root, issues)
        refuse_class_folder(path, images, issues.paths, issues.class_names, "--linked")
        _write_linked(path, issues, given, labels, drop, images)
    return Relabeled(path, len(issues), changed, sum(drop))


def undo_relabel(path: str | Path) -> int:
    """Remove the files written by :func:`relabel`.

    Args:
        path: the label file or the linked folder.

    Returns:
        Number of removed files and links.

    Raises:
        FileNotFoundError: if there is no ``relabel.json``.
        ValueError: if a file was modified; no file is removed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    record = folder / RECORD
    if not record.is_file():
        raise FileNotFoundError(
            f"expected {str(record)!r}, written by sanm relabel, got no such file; give the label file or folder that sanm "
            "relabel wrote"
        )
    try:
        written = json.loads(record.read_text(encoding="utf-8"))
        files, links, folders = dict(written["files"]), dict(written["links"]), list(written["folders"])
        if not all(isinstance(name, str) for name in (*files, *files.values(), *links, *links.values(), *folders)):
            raise ValueError("names that are no texts")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a record of sanm relabel in {str(record)!r}, got {error}; remove it by hand"
        ) from error
    outside = [name for name in (*files, *links, *folders) if not _is_inside(name)]
    if outside:
        raise ValueError(
            f"expected names inside {str(folder)!r} in {str(record)!r}, got {outside[0]!r}; remove it by hand"
        )
    if path != folder and path.name not in files:
        raise ValueError(
            f"expected a file that {str(record)!r} lists, got {str(path)!r}; name one of {sorted(files)[:3]}"
        )
    there = [name for name in (*files, *links) if os.path.lexists(folder / name)]
    changed = [name for name in there if not _is_as_written(folder / name, files.get(name), links.get(name))]
    if changed:
        raise ValueError(
            f"expected the files of {str(folder)!r} as sanm relabel wrote them, got {len(changed)} modified since, the first "
            f"{changed[0]!r}; nothing was removed, remove by hand what you do not need"
        )
    for name in there:
        (folder / name).unlink()
    record.unlink()
    for name in sorted(folders, key=len, reverse=True):
        with contextlib.suppress(OSError):  # the folder contains other files
            (folder / name).rmdir()
    return len(there)


# ---- the audit ----------------------------------------------------------------------------------------------------------


def _read_audit(folder: Path) -> tuple[LabelIssues, list[bool]]:
    """Return the audited samples and the others of the original training set, and whether each is dropped already."""
    table, samples = folder / "label_issues.csv", folder / "samples.npz"
    if not table.is_file():
        raise FileNotFoundError(
            f"expected a folder that sanm audit wrote in {str(folder)!r}, got no {table.name} in it; run sanm audit first"
        )
    held: dict[str, Any] = {}
    if samples.is_file():  # also contains classes without samples
        with np.load(samples, allow_pickle=False) as arrays:
            wanted = ("class_names", "other_index", "other_paths", "other_labels", "other_dropped")
            held = {name: arrays[name] for name in wanted if name in arrays.files}
    issues = read_label_issues(table, held["class_names"].tolist() if "class_names" in held else None)
    dropped = [False] * len(issues)
    if "other_labels" not in held:
        return issues, dropped
    names = held["other_index" if issues.paths is None else "other_paths"]
    return _with_others(issues, names, held["other_labels"]), [*dropped, *held["other_dropped"].tolist()]


def _with_others(issues: LabelIssues, names: Array, labels: Array) -> LabelIssues:
    """Append samples that were not audited."""
    size, count = len(issues), len(labels)
    unknown = np.full(count, np.nan)
    return LabelIssues(
        paths=None if issues.paths is None else [*issues.paths, *names.tolist()],
        index=None if issues.index is None else np.concatenate([issues.index, names]),
        splits=[*issues.splits, *["train"] * count],
        given=np.concatenate([issues.given, labels]),
        suggested=np.concatenate([issues.suggested, labels]),
        quality=np.concatenate([issues.quality, unknown]),
        p_given=np.concatenate([issues.p_given, unknown]),
        p_suggested=np.concatenate([issues.p_suggested, unknown]),
        class_names=issues.class_names,
        unreadable=issues.unreadable | dict.fromkeys(range(size, size + count), "not audited"),
    )


# ---- a label file ------------------------------------------------------------------------------------------------------


def _tables(
    issues: LabelIssues, given: list[str], labels: list[str], drop: list[bool]
) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return header and rows of the label file and of the changes, by path or position."""
    names = issues.names
    indexed = issues.paths is None
    order = sorted(range(len(names)), key=(lambda i: int(names[i])) if indexed else (lambda i: names[i]))
    cells = [[names[i], given[i], labels[i], str(int(drop[i]))] for i in order]
    headers = [by_index(header) if indexed else header for header in (LABELS_HEADER, CHANGES_HEADER)]
    return {
        "labels": (headers[0], [[name, label, dropped] for name, _, label, dropped in cells]),
        "changes": (headers[1], [row for row in cells if row[1] != row[2] or row[3] == "1"]),
    }


def _write_labels(
    path: Path, issues: LabelIssues, given: list[str], labels: list[str], drop: list[bool], overwrite: bool
) -> None:
    changes, record = path.with_name("changes.csv"), path.with_name(RECORD)
    if path.name in (changes.name, record.name):
        raise ValueError(f"expected another name than {path.name!r}, which is written beside it; choose one")
    for file, header in ((path, LABELS_HEADER), (changes, CHANGES_HEADER)):
        if os.path.lexists(file) and not (overwrite and _starts_with(file, header)):
            advice = (
                "choose another folder" if overwrite else "choose another folder, or --overwrite true for a label file"
            )
            raise FileExistsError(f"expected no file {str(file)!r}, which exists and is not replaced; {advice}")
    if os.path.lexists(record) and not overwrite:
        raise FileExistsError(f"expected no file {str(record)!r}, which an undo needs; choose another folder")
    tables = _tables(issues, given, labels, drop)
    new = [file for file in (path, changes) if not file.exists()]
    try:
        for file, name in ((path, "labels"), (changes, "changes")):
            write_csv(file, *tables[name])
        _write_record(record, {file.name: _digest(file) for file in (path, changes)}, {}, [])
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        raise


def _starts_with(file: Path, header: list[str]) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as content:
        first = content.readline(200).rstrip(b"\r\n").decode("utf-8", "replace")
    return first in (",".join(header), ",".join(by_index(header)))


# ---- a folder of links -------------------------------------------------------------------------------------------------


def _recorded_root(folder: Path) -> str | None:
    """Return the audited folder; None if there is no summary, or no folder."""
    summary = folder / "audit.json"
    try:
        root: str | None = json.loads(summary.read_text(encoding="utf-8")).get("root") if summary.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"expected the summary of an audit in {str(summary)!r}, got {error}; give --root") from error
    return root


def _find_root(folder: Path, root: str | Path | None, issues: LabelIssues) -> Path:
    """Return the folder that paths are relative to."""
    if issues.paths is None:
        raise ValueError(
            "expected an audit of image files for --linked, got one of a data set without files; use --out"
        )
    root = _recorded_root(folder) if root is None else root
    if root is None and not all(os.path.isabs(path) for path in issues.paths):
        raise ValueError("expected the folder that the audited paths are relative to, got none; give --root")
    return Path(root or ".").absolute()


def _write_linked(
    path: Path, issues: LabelIssues, given: list[str], labels: list[str], drop: list[bool], root: Path
) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"expected no file or folder {str(path)!r}, which exists already; choose another name")
    sources = [root / name for name in issues.names]
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise FileNotFoundError(
            f"expected the {len(sources)} audited files in {str(root)!r}, got {len(missing)} that are not there, the first "
            f"{str(missing[0])!r}; give --root"
        )
    bad = sorted({label for label in labels if label.startswith(".") or not label or set(label) & set("/\\\0")})
    if bad:
        raise ValueError(f"expected classes that can be names of folders, got {bad[0]!r}; use --out")
    draft = path.with_name(path.name + ".tmp")
    try:
        draft.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(
            f"expected no folder {str(draft)!r}, which an interrupted relabel left; remove it"
        ) from None
    try:
        files: dict[str, str] = {}
        links: dict[str, str] = {}
        places = _places(issues, given, labels, drop)
        for row, place in places.items():
            (draft / place).parent.mkdir(parents=True, exist_ok=True)
            if _link(sources[row], draft / place):
                links[place] = str(sources[row])
            else:
                files[place] = _digest(draft / place)
        write_csv(draft / "changes.csv", *_tables(issues, given, labels, drop)["changes"])
        files["changes.csv"] = _digest(draft / "changes.csv")
        folders = {str(parent) for place in places.values() for parent in Path(place).parents}
        _write_record(draft / RECORD, files, links, sorted(folders | {"."}))
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _places(issues: LabelIssues, given: list[str], labels: list[str], drop: list[bool]) -> dict[int, str]:
    """Return where each kept row goes, as ``split/class/name``; names that are taken get a number."""
    taken: set[str] = set()
    places = {}
    rows = [row for row in range(len(issues)) if not drop[row]]
    for row in sorted(rows, key=lambda row: (labels[row] != given[row], issues.names[row])):  # who stays keeps the name
        split = issues.splits[row]
        folder = "" if split == "all" else f"{split}/"
        name = Path(issues.names[row])
        number, place = 1, f"{folder}{labels[row]}/{name.name}"
        while place.casefold() in taken:
            number += 1
            place = f"{folder}{labels[row]}/{name.stem}-{number}{name.suffix}"
        taken.add(place.casefold())
        places[row] = place
    return places


def _link(source: Path, target: Path) -> bool:
    """Link to a file, or copy it where the file system has no links; return whether it is a symbolic link."""
    try:
        target.symlink_to(source)
    except OSError:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return False
    return True


# ---- the record of what was written -------------------------------------------------------------------------------------


def _write_record(path: Path, files: dict[str, str], links: dict[str, str], folders: list[str]) -> None:
    content: dict[str, Any] = {"version": 1, "files": files, "links": links, "folders": folders}
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _is_as_written(path: Path, digest: str | None, link: str | None) -> bool:
    if link is not None:
        return path.is_symlink() and os.readlink(path) == link
    return path.is_file() and not path.is_symlink() and _digest(path) == digest
