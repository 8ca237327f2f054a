"""Write the run folder of an audit, and read it back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sanm_lightning.audit.label_issues import LabelIssues, write_label_issues
from sanm_lightning.audit.report import write_report
from sanm_lightning.audit.sets import AuditSet
from sanm_lightning.audit.summary import verdict
from sanm_lightning.data.image_folder import read_image
from sanm_lightning.safe_files import atomic_write

__all__ = ["read_noise_rate", "remove_audit", "write_audit"]

FILES = ("label_issues.csv", "pred_probs.npy", "samples.npz", "audit.json", "report.html")
"""Files that :func:`write_audit` writes, besides ``thumbs/``."""

Array = np.ndarray[Any, Any]


def write_audit(folder: str | Path, data: AuditSet, issues: LabelIssues, probs: Array, summary: dict[str, Any]) -> None:
    """Write the files of an audit.

    These are ``label_issues.csv``, ``pred_probs.npy``, ``samples.npz`` (the samples of its rows), ``audit.json`` and
    ``report.html``.

    Args:
        folder: output folder; created if missing.
        data: the audited set.
        issues: the table of label issues.
        probs: class probabilities, shape (N, C).
        summary: content of ``audit.json``, from :func:`summarize`.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(folder)
    write_label_issues(folder / "label_issues.csv", issues)
    with atomic_write(folder / "pred_probs.npy") as file:
        np.save(file, probs)
    names = {"paths": np.array(issues.paths, np.str_)} if issues.paths is not None else {"index": issues.index}
    others = {} if data.others is None else data.others.arrays()
    with atomic_write(folder / "samples.npz") as file:
        np.savez_compressed(
            file, **names, **others, splits=np.array(issues.splits, np.str_), labels=issues.given, quality=issues.quality,
            class_names=np.array(issues.class_names, np.str_), readable=issues.readable,
        )  # fmt: skip
    with atomic_write(folder / "audit.json") as file:
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        file.write(text.encode("utf-8", "backslashreplace"))  # invalid UTF-8 in names becomes an escape of JSON
    titles = {
        "contradicting": "Copies with different labels (of identical images, at least one label is wrong)",
        "leaks": "Copies in several splits",
        "exact": "Exact copies",
        "near": "Near copies",
    }
    groups = summary["duplicates"]
    write_report(
        folder,
        issues,
        {
            "title": "" if data.root is None else str(data.root),
            "verdict": verdict(summary),
            "classes": summary["classes"],
            "classes_of": summary["fitted_split"] if len(summary["splits"]) > 1 else None,
            "findings": [
                {"title": title, "items": groups[name][:200], "count": len(groups[name])}
                for name, title in titles.items()
                if groups[name]
            ],
            "notes": summary["notes"],
        },
        lambda row: _picture(data.images[row]),
        root=data.root,
        transition=np.array(summary["transition"]),
    )


def remove_audit(folder: str | Path) -> None:
    """Remove what :func:`write_audit` has written to a folder, such as after an error; other files are kept.

    Args:
        folder: output folder; it may lack some of the files, or not exist.
    """
    folder = Path(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "thumbs", ignore_errors=True)


def read_noise_rate(path: str | Path) -> float:
    """Return the estimated fraction of wrong labels of an audit.

    Args:
        path: run folder of the audit, or its ``audit.json``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file does not belong to an audit.
    """
    path = Path(path)
    path = path / "audit.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a number or the audit.json of an audit, got {str(path)!r}; run sanm audit first"
        )
    try:
        rate = float(json.loads(path.read_text(encoding="utf-8"))["noise_rate"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected audit.json of an audit in {str(path)!r}, got an invalid file ({error}); use that of sanm audit"
        ) from error
    return rate


def _picture(image: Any) -> Array:
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).numpy()
    with Image.open(image) as opened:
        side = min(opened.size)
    return read_image(image, min(side, 96)).permute(1, 2, 0).numpy()
