"""Summarize an audit: estimated noise rates, classes, class pairs, duplicates and notes."""

import hashlib
from typing import Any

import numpy as np

from sanm_lightning.audit.duplicates import Duplicates
from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.audit.sets import AuditSet, fitted_rows, fitted_split
from sanm_lightning.functional.noise_model import transition_of

__all__ = ["describe_unreadable", "summarize", "verdict"]

MIN_CLASS_SIZE = 5
"""Number of images of a class, one for each fold of the probe, below which its labels cannot be assessed."""

Array = np.ndarray[Any, Any]


def describe_unreadable(data: AuditSet, unreadable: dict[int, str]) -> str:
    """Return the number of unreadable images with an example; empty if there are none."""
    if not unreadable:
        return ""
    row, reason = next(iter(unreadable.items()))
    name = data.paths[row] if data.paths is not None else f"image {row}"
    return f"{len(unreadable)} unreadable, such as {name!r} ({reason})"


def summarize(
    data: AuditSet,
    issues: LabelIssues,
    joint: Array,
    interval: tuple[float, float] | None = None,
    copies: Duplicates | None = None,
) -> dict[str, Any]:
    """Create the content of ``audit.json``, which the report also uses.

    The entries on classes, and the noise rate, describe the samples that the noise model is fitted to, ``fitted_split``.

    Args:
        data: the audited set.
        issues: the table of label issues.
        joint: joint distribution of given (rows) and true labels (columns), shape (C, C), sums to 1.
        interval: lowest and highest estimate of the fraction of wrong labels.
        copies: duplicates.
    """
    names, labels = data.class_names, issues.given
    counts = np.bincount(labels[fitted_rows(issues.splits)], minlength=len(names))
    readable = np.bincount(labels[fitted_rows(issues.splits) & issues.readable], minlength=len(names))
    present = np.bincount(labels, minlength=len(names)) > 0
    true_given = joint / np.maximum(joint.sum(1, keepdims=True), 1e-12)  # true label for each given label
    off = joint - np.diag(np.diag(joint))
    pairs = [
        {"given": names[i], "suggested": names[j], "fraction": round(float(off[i, j]), 5)}
        for i, j in zip(*np.unravel_index(np.argsort(-off, axis=None)[:10], off.shape), strict=True)
        if off[i, j] > 0
    ]
    classes = [
        {
            "name": name,
            "count": int(counts[c]),
            "wrong": round(1 - float(true_given[c, c]), 4) if readable[c] else None,
            "confused_with": names[int(off[c].argmax())] if off[c].any() else None,
        }
        for c, name in enumerate(names)
    ]
    sample_names = issues.names
    kinds = Duplicates._fields[1:]
    groups = {name: [[sample_names[row] for row in part] for part in getattr(copies, name, [])] for name in kinds}
    notes = list(data.notes)
    if issues.unreadable:
        notes.append(f"{describe_unreadable(data, issues.unreadable)}: listed at the end of the table.")
    small = [f"{names[c]!r} ({readable[c]})" for c in np.flatnonzero((counts > 0) & (readable < MIN_CLASS_SIZE))]
    if small:
        notes.append(
            f"Classes with fewer than {MIN_CLASS_SIZE} readable images, whose labels cannot be assessed: {', '.join(small)}."
        )
    empty = [repr(names[c]) for c in np.flatnonzero(~present)]
    if empty:
        notes.append(f"Classes without images: {', '.join(empty)}.")
    classes_of = {split: set(labels[np.array(data.splits) == split].tolist()) for split in dict.fromkeys(data.splits)}
    partly = [
        f"{name!r} ({', '.join(split for split in classes_of if c in classes_of[split])} only)"
        for c, name in enumerate(names)
        if 0 < sum(c in held for held in classes_of.values()) < len(classes_of)
    ]
    if partly:
        notes.append(f"Classes that are not in every split, possibly under another name: {', '.join(partly)}.")
    sizes = counts[counts > 0]
    if len(sizes) and sizes.max() >= 10 * sizes.min():
        notes.append(f"Classes are imbalanced: from {sizes.min()} to {sizes.max()} images.")
    content = hashlib.blake2b(digest_size=8)
    for name, label in zip(sample_names, labels.tolist(), strict=True):
        content.update(f"{name}\0{names[label]}\0".encode("utf-8", "surrogateescape"))
    return {
        "root": None if data.root is None else str(data.root.absolute()),
        "num_images": len(labels),
        "splits": _split_rates(issues),
        "fitted_split": fitted_split(issues.splits),
        "noise_rate": round(float(off.sum()), 4),
        "interval": None if interval is None else [round(end, 4) for end in interval],
        "worst_pair": pairs[0] if pairs else None,
        "pairs": pairs,
        "classes": classes,
        "class_names": list(names),
        "transition": transition_of(joint).round(5).tolist(),
        "duplicates": groups,
        "unreadable": {sample_names[row]: reason for row, reason in issues.unreadable.items()},
        "notes": notes,
        "data_id": content.hexdigest(),
    }


def _split_rates(issues: LabelIssues) -> dict[str, dict[str, Any]]:
    """Return size and estimated noise rate of each split."""
    found = {}
    names = np.array(issues.splits)
    for split in dict.fromkeys(issues.splits):
        rows = (names == split) & issues.readable
        rate = round(1 - float(issues.quality[rows].mean(dtype=np.float64)), 4) if rows.any() else None
        found[split] = {"count": int((names == split).sum()), "noise_rate": rate}
    return found


def verdict(summary: dict[str, Any]) -> str:
    """Return the result in one line."""
    span, pair, splits = summary["interval"], summary["worst_pair"], dict(summary["splits"])
    first = summary["fitted_split"]
    size = summary["num_images"] if first is None else splits[first]["count"]
    where = f"{size:,} labels" + (f" of {first}" if first is not None and len(splits) > 1 else "")
    known = "" if span is None else f" (estimates from {span[0]:.1%} to {span[1]:.1%})"
    rates = {name: part["noise_rate"] for name, part in splits.items() if name != first}
    others = "".join(
        f"; of {name} " + ("unknown" if rate is None else f"about {rate:.1%}") for name, rate in rates.items()
    )
    worst = f"; most frequent: given {pair['given']!r}, suggested {pair['suggested']!r}" if pair else ""
    return f"about {summary['noise_rate']:.1%} of {where} are wrong{known}{others}{worst}"
