"""The estimated fraction of wrong labels where only some classes are noisy: CIFAR-10, 5,000 images.

    pip install -e '.[pretrained]'
    python examples/audit_some_classes.py --root DIR --runs FOLDER

DIR has ``train/<class>/0000.jpg``. 500 images of each class are copied to the folder of their given label, which is wrong for
some, and audited by ``sanm audit``. Results: results/audit_some_classes.json.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import numpy as np
from _runs import record, sanm
from clean_or_train import NAMES, auroc

RESULTS = Path("results/audit_some_classes.json")
STUDY = {
    "data": "CIFAR-10 as JPEG files, 5,000 training images balanced over the classes",
    "command": "python examples/audit_some_classes.py --root DIR --runs FOLDER",
}
SETS = {
    "60 % of cats and dogs replaced": ("cat", "dog"),
    "60 % of airplanes and trucks replaced": ("airplane", "truck"),
    "1,500 images of other classes labeled airplane or truck": None,
}
"""The classes with replaced labels by the name of the set."""


def given_labels(true: np.ndarray, classes: tuple[str, ...] | None, seed: int = 0) -> np.ndarray:
    """Return labels (N,), of which some are wrong."""
    draw, given = np.random.default_rng(seed), true.copy()
    if classes is None:
        two = [NAMES.index("airplane"), NAMES.index("truck")]
        rows = draw.permutation(np.flatnonzero(~np.isin(true, two)))[:1500]
        given[rows] = draw.choice(two, len(rows))
    else:
        noisy = np.flatnonzero(np.isin(true, [NAMES.index(name) for name in classes]))
        rows = draw.permutation(noisy)[: round(0.6 * len(noisy))]
        given[rows] = (true[rows] + draw.integers(1, len(NAMES), len(rows))) % len(NAMES)
    return given


def main() -> None:
    """Run the audits that are not recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/audit_some_classes"))
    parser.add_argument("--cache", type=Path, default=None, help="folder of cached features; default: in --runs")
    options = parser.parse_args()
    true, draw = np.repeat(np.arange(len(NAMES)), 500), np.random.default_rng(0)
    files = np.concatenate([np.sort(draw.choice(5000, 500, False)) for _ in NAMES])
    for number, (name, classes) in enumerate(SETS.items()):
        run, images, given = options.runs / str(number), options.runs / f"images{number}", given_labels(true, classes)
        if not (run / "audit.json").exists():
            for label, file, shown in zip(true, files, given, strict=True):
                (images / NAMES[shown]).mkdir(parents=True, exist_ok=True)
                source = options.root / "train" / NAMES[label] / f"{file:04d}.jpg"
                shutil.copy(source, images / NAMES[shown] / f"{NAMES[label]}_{source.name}")
            words = ["--cache", str(options.cache or options.runs / "cache"), "--out", str(run)]
            sanm("audit", str(images), *words, log=options.runs / f"{number}.log")
        summary = json.loads((run / "audit.json").read_text())
        with (run / "label_issues.csv").open(newline="") as file:
            issues = list(csv.DictReader(file))
        wrong = np.array([Path(row["path"]).name.split("_")[0] != row["given_label"] for row in issues])
        found = {
            "wrong": float(wrong.mean()),
            "estimated": summary["noise_rate"],
            "interval": summary["interval"],
            "auroc": auroc(-np.array([float(row["quality"]) for row in issues]), wrong),
        }
        record(RESULTS, STUDY, (name,), found)


if __name__ == "__main__":
    main()
