"""Verdicts on the samples of an audit, and the labels that follow from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.csv_tables import read_csv

__all__ = ["Accepted", "apply_accepted", "apply_suggestions", "by_index", "read_accepted"]

VERDICTS = ("wrong", "right", "drop", "ambiguous")
ACCEPTED_HEADER = ["path", "split", "given_label", "verdict", "new_label"]


class Accepted(NamedTuple):
    """Manual verdicts on samples of an audit.

    Attributes:
        names: path, or position as text, of each sample.
        given: names of the given labels.
        verdicts: ``wrong``, ``right``, ``drop`` or ``ambiguous``.
        new_labels: names of the true labels; empty unless the verdict is ``wrong``.
    """

    names: list[str]
    given: list[str]
    verdicts: list[str]
    new_labels: list[str]


def by_index(header: Sequence[str]) -> list[str]:
    """Return a header with ``index`` instead of ``path``."""
    return ["index", *header[1:]]


def read_accepted(path: str | Path) -> Accepted:
    """Read ``accepted.csv``, which is exported from ``report.html``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is empty, has another header, a duplicate sample, an unknown verdict, ``wrong`` without
            a new label, or a new label with another verdict.
    """
    _, rows = read_csv(path, [ACCEPTED_HEADER, by_index(ACCEPTED_HEADER)])
    where = repr(str(path))
    if not rows:
        raise ValueError(f"expected verdicts in {where}, got none; give verdicts in report.html and export them again")
    for number, (name, _, _, verdict, new_label) in enumerate(rows, start=1):
        row = f"in row {number} ({name!r}) of {where}"
        if verdict not in VERDICTS:
            raise ValueError(f"expected a verdict among {', '.join(VERDICTS)} {row}, got {verdict!r}; correct it")
        if (verdict == "wrong") != (new_label != ""):
            what = f"the verdict {verdict!r} with the new label {new_label!r}"
            raise ValueError(
                f"expected a new label where the verdict is wrong, and only there, got {what} {row}; correct it"
            )
    names = [row[0] for row in rows]
    if len(set(names)) < len(names):
        twice = next(name for name, before in zip(sorted(names)[1:], sorted(names), strict=False) if name == before)
        number = len(names) - len(set(names))
        raise ValueError(
            f"expected each sample once in {where}, got {number} rows more, the first {twice!r}; remove them"
        )
    return Accepted(names, [row[2] for row in rows], [row[3] for row in rows], [row[4] for row in rows])


def apply_accepted(
    issues: LabelIssues, path: str | Path, drop_ambiguous: bool, new_classes: bool
) -> tuple[list[str], list[bool]]:
    """Return the corrected labels of an audit.

    Args:
        issues: the table of label issues, N samples.
        path: file of verdicts on some of the samples.
        drop_ambiguous: whether samples marked ambiguous are dropped.
        new_classes: whether new labels may be classes that are not in the data set.

    Returns:
        Label names, and whether each sample is dropped, both of length N in the order of the table.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the verdicts do not belong to this audit, or a new label is not a class.
    """
    accepted = read_accepted(path)
    classes = issues.class_names
    row_of = {name: row for row, name in enumerate(issues.names)}
    others = [name for name in accepted.names if name not in row_of]
    of = f"of {len(accepted.names)} in {str(path)!r}"
    if others:
        raise ValueError(
            f"expected samples of the audit, got {len(others)} {of} that are not among its {len(issues)}, the first "
            f"{others[0]!r}; give the accepted.csv of this audit"
        )
    rows = [row_of[name] for name in accepted.names]
    labels, drop = [classes[label] for label in issues.given.tolist()], [False] * len(issues)
    differing = [i for i, row in enumerate(rows) if labels[row] != accepted.given[i]]
    if differing:
        i = differing[0]
        raise ValueError(
            f"expected the given labels of the audit, got {len(differing)} others {of}, the first {accepted.given[i]!r} for "
            f"{accepted.names[i]!r}, which has {labels[rows[i]]!r}; give the accepted.csv of this audit"
        )
    known = set(classes)
    unknown = [name for name in accepted.new_labels if name and name not in known]
    if unknown and not new_classes:
        raise ValueError(
            f"expected new labels among the {len(classes)} classes of the audit, got {len(unknown)} others {of}, the first "
            f"{unknown[0]!r}; correct them, or give --new_classes true"
        )
    for row, verdict, new_label in zip(rows, accepted.verdicts, accepted.new_labels, strict=True):
        if verdict == "wrong":
            labels[row] = new_label
        drop[row] = verdict == "drop" or (verdict == "ambiguous" and drop_ambiguous)
    return labels, drop


def apply_suggestions(issues: LabelIssues, below: float, min_p_suggested: float) -> tuple[list[str], list[bool]]:
    """Return labels as in :func:`apply_accepted`, with suggestions for samples of a quality of at most ``below``."""
    with np.errstate(invalid="ignore"):
        chosen = issues.readable & (issues.quality <= below) & (issues.p_suggested >= min_p_suggested)
    labels = np.where(chosen, issues.suggested, issues.given)
    return [issues.class_names[label] for label in labels.tolist()], [False] * len(issues)
