"""The list of wrong labels of small images by the size at which a frozen network sees them: CIFAR-10N worst, 1,500 images.

    pip install -e '.[pretrained]'
    python examples/audit_image_size.py --root DIR --labels cifar10n.npz --runs FOLDER --sizes 96 128 160 224

DIR has ``train/<class>/0000.jpg``; CIFAR-10N's labels are in that order. 150 images of each true class are copied to the folder
of their given label and audited by ``sanm audit --image_size SIZE``. Results: results/audit_image_size.json.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
from _runs import record, sanm
from clean_or_train import NAMES, auroc

RESULTS = Path("results/audit_image_size.json")
STUDY = {
    "data": "CIFAR-10 as JPEG files with the labels of CIFAR-10N worst, 1,500 training images balanced over the true classes",
    "command": "python examples/audit_image_size.py --root DIR --labels cifar10n.npz --runs FOLDER --sizes 96 128 160 224",
}


def copy_images(root: Path, labels: Path, images: Path) -> None:
    """Copy 150 training images of each true class to the folder of their given label."""
    with np.load(labels) as file:
        true, given = file["clean_label"], file["worse_label"]
    draw = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        for row in draw.choice(np.flatnonzero(true == label), 150, False):
            (images / NAMES[given[row]]).mkdir(parents=True, exist_ok=True)
            file = f"{row % 5000:04d}.jpg"
            shutil.copy(root / "train" / name / file, images / NAMES[given[row]] / f"{name}_{file}")


def judged(run: Path) -> dict[str, float]:
    """Return the quality of the list of an audit, and the seconds of the features."""
    with (run / "label_issues.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    quality = np.array([float(row["quality"]) for row in rows])
    wrong = np.array([Path(row["path"]).name.split("_")[0] != row["given_label"] for row in rows])
    summary = json.loads((run / "audit.json").read_text())
    return {
        "auroc": auroc(-quality, wrong),
        "precision_at_100": float(wrong[:100].mean()),
        "precision_at_300": float(wrong[:300].mean()),
        "wrong": float(wrong.mean()),
        "estimated": summary["noise_rate"],
        "feature_seconds": summary["seconds"]["features"],
    }


def main() -> None:
    """Run the audits that are not recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/audit_image_size"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160, 224])
    options = parser.parse_args()
    if not (options.runs / "imgs").exists():
        copy_images(options.root, options.labels, options.runs / "imgs")
    for size in options.sizes:
        run = options.runs / f"out{size}"
        if not (run / "audit.json").exists():
            words = ["--image_size", str(size), "--cache", str(options.runs / "cache"), "--out", str(run)]
            sanm("audit", str(options.runs / "imgs"), *words, log=options.runs / f"log{size}")
        record(RESULTS, STUDY, ("worst", str(size)), judged(run))


if __name__ == "__main__":
    main()
