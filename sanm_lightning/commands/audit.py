"""``sanm audit``: list samples with likely wrong labels."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sanm_lightning.audit import (
    AuditSet,
    LabelIssues,
    audit_set,
    audit_set_of,
    folder_audit_set,
    read_label_issues,
    write_audit,
)
from sanm_lightning.audit.run_folder import remove_audit
from sanm_lightning.audit.sets import refuse_class_folder
from sanm_lightning.audit.summary import verdict
from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.command_line.sentences import INTERRUPTED
from sanm_lightning.csv_tables import write_csv
from sanm_lightning.processing import default_num_workers

__all__ = ["audit", "main"]

AUDITS = Path("audits")
"""Default folder of the results of all audits."""
DRAFT = "features.npy.tmp"
"""Features of an audit in progress; remains only if the process is killed. Such a folder is written again."""
NEW_ISSUES = "new_issues.csv"


def audit(
    root: str | None = None,
    data: L.LightningDataModule | None = None,
    split: str = "train",
    out: str | None = None,
    network: str | None = None,
    checkpoint: str | None = None,
    image_size: int | None = None,
    cache: str | None = None,
    baseline: str | None = None,
    fail_over: float | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> int:
    """List samples with likely wrong labels, without training a network.

    Args:
        root: folder that contains class folders, or ``train/`` (``val/``, ``test/``) with class folders.
        data: data module, instead of a folder; the audited labels are those of a training run.
        split: split of the data module: ``train``, ``val``, ``test`` or the name of a further test set.
        out: new folder for the results. Default: ``audits/version_<n>``.
        network: timm model name of a pre-trained network. Default: ``tf_efficientnet_lite0``.
        checkpoint: weight file of the network, or checkpoint of a ``sanm`` run, whose encoder is used.
        image_size: input size of the network in pixels. Default: selected from the size of the images.
        cache: folder of cached features. Default: the cache folder of the user.
        baseline: ``label_issues.csv`` of a previous audit: only issues that it does not contain are reported.
        fail_over: exit with status 1 if the estimated fraction of wrong labels exceeds this value, in [0, 1]; with a
            baseline, if the fraction of images with new issues exceeds it.
        batch_size: number of images per forward pass.
        num_workers: number of worker processes that read and decode images. Default: one per CPU, up to four, none for
            one CPU.
        device: ``auto``, ``cpu``, ``cuda``, ...
        seed: random seed of the folds.

    Returns:
        Exit status: 0, or 1 above ``fail_over``.

    Raises:
        ValueError: if an argument is out of range, or there is nothing to audit.
        OSError: if a file cannot be read or written, or ``out`` exists.
    """
    if (root is None) == (data is None):
        got = "neither" if root is None else "both"
        raise ValueError(
            f"expected a folder or a data module, got {got}; use 'sanm audit ROOT' or 'sanm audit --data CLASS'"
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("image_size", image_size, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"expected {name} of {least} or more, got {value}; use a larger value")
    if fail_over is not None and not 0 <= fail_over <= 1:
        raise ValueError(f"expected fail_over in [0, 1], got {fail_over}; use 0.05 for 5 %")
    old = read_label_issues(baseline) if baseline is not None else None
    pool = folder_audit_set(root) if root is not None else audit_set_of(data, split)
    if old is not None:
        _require_shared_samples(pool, old, str(baseline))
    folder = _new_folder(out, pool)
    console = Console(highlight=False, soft_wrap=True)
    workers = default_num_workers() if num_workers is None else num_workers
    with _removed_on_failure(folder):
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=console, transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task("features", total=len(pool.labels), rate="")

            def progress(done: int, run: int) -> None:
                speed = bar.tasks[task].speed
                bar.update(task, completed=done, rate=f"{speed:.0f} images/s" if speed else "")

            result = audit_set(
                pool, folder / DRAFT, network, checkpoint, image_size, cache, batch_size=batch_size, num_workers=workers,
                device=device, seed=seed, say=bar.console.print, progress=progress,
            )  # fmt: skip
        write_audit(folder, pool, result.issues, result.probs, result.summary)
        new = None if old is None else _new_issues(result.issues, old)
        if new is not None:
            _write_new(folder / NEW_ISSUES, result.issues, new)
        os.replace(folder / DRAFT, folder / "features.npy")  # last: a folder with the draft is unfinished
    console.print(_class_table(result.summary), soft_wrap=False)
    for note in result.summary["notes"]:
        console.print(f"note: {note}", markup=False)
    groups = result.summary["duplicates"]
    counts = {
        "exact": "exact copies",
        "near": "near copies",
        "contradicting": "with different labels",
        "leaks": "across splits",
    }
    console.print("groups of copies: " + ", ".join(f"{len(groups[name])} {words}" for name, words in counts.items()))
    console.print(verdict(result.summary), markup=False, style="bold")
    fraction = result.summary["noise_rate"]
    if new is not None:
        fraction = len(new) / len(pool.labels)
        console.print(f"{len(new)} issues not in the baseline, listed in {folder / NEW_ISSUES}", markup=False)
    console.print(f"results: {folder}; open {folder / 'report.html'} to review them", markup=False)
    if fail_over is not None and fraction > fail_over:
        console.print(f"{fraction:.2%} exceeds --fail_over, {fail_over:.2%}", markup=False)
        return 1
    return 0


def _new_folder(out: str | None, pool: AuditSet) -> Path:
    if out is None:
        taken = [int(path.name[8:]) for path in AUDITS.glob("version_*") if path.name[8:].isdigit()]
        folder = AUDITS / f"version_{max(taken, default=-1) + 1}"
    else:
        folder = Path(out)
    if pool.root is not None:
        refuse_class_folder(folder, pool.root, pool.paths, pool.class_names, "--out")
    if folder.exists() and not (folder.is_dir() and ((folder / DRAFT).exists() or not any(folder.iterdir()))):
        raise FileExistsError(f"expected a new folder in {str(folder)!r}, got one with files; use another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"expected a writable folder in {str(folder)!r}, got {error.strerror}; use another --out"
        ) from error
    return folder


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove the files of the audit, and empty folders, when an exception is raised."""
    try:
        yield
    except BaseException:
        remove_audit(folder)
        for name in (DRAFT, NEW_ISSUES):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a folder that is not empty
            folder.rmdir()
            if folder.parent == AUDITS:
                AUDITS.rmdir()
        raise


def _require_shared_samples(pool: AuditSet, old: LabelIssues, baseline: str) -> None:
    """Check that the baseline is of this data set, of which some samples may be new."""
    names = pool.paths if pool.paths is not None else [str(i) for i in pool.index.tolist()]  # type: ignore[union-attr]
    if (pool.paths is None) != (old.paths is None) or not set(names) & set(old.names):
        raise ValueError(
            f"expected a baseline of this data set in {baseline!r}, got {len(old)} samples, none of which is among the "
            f"{len(names)} of this audit (such as {old.names[:1]} and {names[:1]}); use the label_issues.csv of an earlier "
            "audit of the same root"
        )


def _is_issue(issues: LabelIssues) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = issues.readable & (issues.suggested != issues.given) & (issues.quality < 0.5)
    return found


def _new_issues(now: LabelIssues, old: LabelIssues) -> list[int]:
    """Return the rows of issues that were no issues with this label in the baseline, by increasing quality."""
    known = {(old.names[row], old.class_names[old.given[row]]) for row in np.flatnonzero(_is_issue(old))}
    issue = _is_issue(now)
    return [int(r) for r in now.order() if issue[r] and (now.names[r], now.class_names[now.given[r]]) not in known]


def _write_new(path: Path, issues: LabelIssues, rows: list[int]) -> None:
    names = issues.class_names
    header = ["path" if issues.paths is not None else "index", "split", "given_label", "suggested_label", "quality"]
    write_csv(
        path,
        header,
        (
            [
                issues.names[r],
                issues.splits[r],
                names[issues.given[r]],
                names[issues.suggested[r]],
                f"{issues.quality[r]:.6f}",
            ]
            for r in rows
        ),
    )


def _class_table(summary: dict[str, Any]) -> Table:
    fitted = summary["fitted_split"] if len(summary["splits"]) > 1 else None
    table = Table(title=f"Classes of {fitted}" if fitted else "Classes")
    for column in ("class", "images", "wrong labels, about", "most often should be"):
        table.add_column(column, justify="left" if column in ("class", "most often should be") else "right")
    shown = sorted(summary["classes"], key=lambda row: -(row["wrong"] or 0) * row["count"])[:30]
    for row in shown:
        wrong = "" if row["wrong"] is None else f"{row['wrong']:.1%}"
        table.add_row(_plain(row["name"]), f"{row['count']:,}", wrong, _plain(row["confused_with"] or ""))
    if len(summary["classes"]) > len(shown):
        table.caption = f"30 of {len(summary['classes'])} classes; all are in audit.json"
    return table


def _plain(text: str) -> str:
    """Escape markup, and bytes that are not UTF-8."""
    return text.replace("[", "\\[").encode("utf-8", "backslashreplace").decode()


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm audit``, run it and return the exit status."""
    parser = CommandParser(prog="sanm audit", description="List samples with likely wrong labels.")
    parser.add_argument(
        "root", nargs="?", type=str | None, default=None, help="folder that contains class folders or split folders"
    )
    parser.add_function_arguments(audit, skip={"root", "data"}, sub_configs=True)
    parser.add_subclass_arguments(
        L.LightningDataModule, "data", required=False, help="data module, instead of a folder"
    )
    parsed = parser.instantiate_classes(
        parser.parse_args([re.sub(r"^--fail-over(?=$|=)", "--fail_over", word) for word in words])
    )
    try:
        return audit(**{key: value for key, value in parsed.as_dict().items() if key != "config"})
    except KeyboardInterrupt:
        print("interrupted; computed features are in the cache, and the same command continues")
        return INTERRUPTED
