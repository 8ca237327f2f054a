r"""Train every method on handwritten digits with wrong labels, alone and under SANM.

    python examples/digits_methods.py --noise sym50 sym80 asym40 --seeds 1 2 3 [--methods PLC ...] [--jobs 2]
    python examples/digits_methods.py --variants masks labels "masks and labels" oracle --methods ForwardCorrection ...
    python examples/digits_methods.py --table

Each run is a command line on the recipe of the quickstart, of this form (C2D pre-trains with SimCLR first):

    sanm fit --config configs/quickstart.yaml [--config configs/sanm.yaml] --data.image_size 16 --model METHOD \
        --data.noise NOISE

with its own folder in ``--runs``. Several processes may share the runs. Results are added to results/digits_noises.json; a
run whose results are there is not run again. ``--table`` prints the results in Markdown.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from _runs import awaited, decimals, folder_options, in_turn, record, recorded, reserved, sanm

from sanm_lightning import Digits

RESULTS = Path("results/digits_noises.json")
PROBE = Path("runs/digits_probe.csv")
EPOCHS = 22
NOISES = {
    "sym50": ("50 % symmetric", "0.5", "{kind: symmetric_exclusive, rate: 0.5}"),
    "sym80": ("80 % symmetric", "0.8", "{kind: symmetric_exclusive, rate: 0.8}"),
    "asym40": ("40 % asymmetric", "0.2", "{kind: asymmetric, rate: 0.4, mapping: {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}}"),
}
"""Name, fraction of wrong labels, and options. The map of asymmetric noise is that of Patrini et al., CVPR 2017, for MNIST:
five of the ten classes are relabeled, so that half of the selected samples get a wrong label."""
CONTRAST = ["--model.k", "20", "--model.view", "weak"]
FINETUNE = ["--model.finetune_lr", "0.001", "--model.bootstrap_after", "3"]
METHODS = {
    "CrossEntropy": [],
    "CoTeaching": ["--model.noise_rate", "RATE", "--model.num_gradual", "3"],
    "CDR": ["--model.noise_rate", "RATE"],
    "ELR": [],
    "ELRPlus": ["--model.ema_ramp_steps", "400"],
    "DivideMix": ["--model.ramp_epochs", "4"],
    "C2D": ["--model.ramp_epochs", "4", "--model.pretrained", "ENCODER"],
    "SSR": ["--model.k", "20", "--model.warmup_epochs", "0"],
    "Mixup": ["--model.alpha", "8"],
    "GCE": [],
    "GCE truncated": ["--model.truncation", "0.5", "--model.prune_every", "5", "--model.warmup_epochs", "15"],
    "ForwardCorrection": ["--model.warmup_epochs", "15"],
    "MCorrection": ["--model.warmup_epochs", "15"],
    "AugDesc": ["--model.ramp_epochs", "4", "--model.train_views", "[auto_augment, auto_augment]"],
    "CoTeachingPlus": ["--model.noise_rate", "RATE", "--model.num_gradual", "3", "--model.warmup_epochs", "5"],
    "PENCIL": ["--model.warmup_epochs", "8", "--model.finetune_lr", "0.005"],
    "JointOptim": ["--model.warmup_epochs", "8", "--model.retrain_lr", "0.005"],
    "PLC": ["--model.warmup_epochs", "8"],
    "SELFIE": ["--model.noise_rate", "RATE", "--model.warmup_epochs", "8", "--model.history", "5"],
    "ActiveBias": ["--model.warmup_epochs", "8"],
    "SMP": ["--model.warmup_epochs", "8"],
    "Nested": ["--data.val_fraction", "0.1"],
    "NestedCoTeaching": ["--model.noise_rate", "RATE", "--model.warmup_epochs", "15", "--data.val_fraction", "0.1"],
    "INCV": ["--model.rounds", "2", "--model.warmup_epochs", "5"],
    "REED": ["--model.warmup_epochs", "8", "--model.ramp_epochs", "4", "--model.pretrained", "ENCODER"],
    "CREMA": ["--model.warmup_epochs", "8"],
    "RRL": ["--model.warmup_epochs", "3", "--model.given_epochs", "3", *CONTRAST],
    "MOIT": ["--model.warmup_epochs", "10", *CONTRAST],
    "MOIT plus": ["--model.warmup_epochs", "10", *CONTRAST, "--model.select_epochs", "6", *FINETUNE],
    "SelCL": ["--model.warmup_epochs", "3", *CONTRAST, "--model.negatives", "500"],
    "SelCL plus": [
        *(
            "--model.warmup_epochs",
            "3",
            *CONTRAST,
            "--model.negatives",
            "500",
            "--model.select_epochs",
            "13",
            *FINETUNE,
        ),
    ],
    "MLNT": [
        *(
            "--model.warmup_epochs",
            "8",
            "--model.meta_lr",
            "0.2",
            "--model.meta_weight",
            "0.4",
            "--model.ramp_steps",
            "200",
        ),
    ],
    "MetaCleaner": [],
    "IEG with 100 known labels": ["--model.probe", "PROBE"],
}
"""Options of each method in addition to the recipe: published stages shortened to 22 epochs, and the fraction of wrong labels
where a method requires it, as published. REED, CREMA and MetaCleaner are recipes after papers without code. IEG uses the true
labels of ten training images per class, and is not comparable with the others."""
ASYMMETRIC = ["--model.lambda_u", "0", "--model.confidence_penalty", "true"]
"""Options published for DivideMix, and for the methods based on it, with asymmetric noise."""
CLASSES = {
    "GCE truncated": "GCE",
    "AugDesc": "DivideMix",
    "MOIT plus": "MOIT",
    "SelCL plus": "SelCL",
    "IEG with 100 known labels": "IEG",
}
VARIANT_ROWS = {
    "alone": ("sanm", False),
    "SANM": ("sanm", True),
    "SANM, masks only": ("masks", True),
    "SANM, regularized labels only": ("labels", True),
    "SANM, no reconstruction": ("masks and labels", True),
    "SANM, label quality from the true labels": ("oracle", True),
    "SANM, `unlabelled_quality: guess`": ("guesses", True),
    "alone, 66 epochs": ("longer", False),
    "SANM, 66 epochs": ("longer", True),
}
"""Variant, and whether SANM is on, by the name of the row."""
SANM = ["--config", "configs/sanm.yaml"]
VARIANTS = {
    "sanm": [],
    "masks": ["--model.sanm.labels", "false", "--model.sanm.reconstruct", "false"],
    "labels": ["--model.sanm.mask", "false", "--model.sanm.reconstruct", "false"],
    "masks and labels": ["--model.sanm.reconstruct", "false"],
    "oracle": ["--model.sanm.quality", "oracle"],
    "guesses": ["--model.unlabelled_quality", "guess"],
    "longer": ["--trainer.max_epochs", "66"],
}
"""Options of SANM's variants: the components alone, label quality from the true labels (not a training method), the quality of
guessed labels in place of the given ones (DivideMix), and three times the epochs, which applies to the run without SANM too."""
STUDY = {
    "data": "scikit-learn digits at 16 x 16, 1297 training and 500 test images; symmetric noise over the other classes, or "
    "asymmetric noise 2 -> 7, 3 -> 8, 5 <-> 6, 7 -> 1, in which half as many labels are wrong",
    "command": "python examples/digits_methods.py --noise sym50 sym80 asym40 --seeds 1 2 3",
}


def row_name(method: str, masked: bool, variant: str = "sanm") -> str:
    """Return the key of a row in the results file."""
    if variant == "longer":
        return f"{method}_sanm longer" if masked else f"{method} longer"
    return f"{method}_{variant}" if masked else method


def fit(seed: int, *words: str, folder: Path) -> dict[str, Any]:
    """Train on the recipe of the quickstart, unless the results exist; return them."""
    if (found := finished(folder)) is None:
        sanm(
            "fit", "--config", "configs/quickstart.yaml", "--data.image_size", "16", "--seed_everything", str(seed), *words,
            "--trainer.enable_progress_bar", "false", *folder_options(folder),
            log=folder.with_name(f"{folder.name}.log"),
        )  # fmt: skip
        found = finished(folder)
    assert found is not None
    return found


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run of all epochs; None if it is not finished."""
    for file in sorted(folder.rglob("results.json")):
        result: dict[str, Any] = json.loads(file.read_text())
        if result["epochs"] >= EPOCHS:
            return result
    return None


def encoder(seed: int, runs: Path) -> str | None:
    """Pre-train without labels, unless it is done; return the checkpoint, None if another process pre-trains."""
    folder = runs / f"SimCLR_{seed}"
    with reserved(folder) as free:
        if not free:
            return None
        fit(
            seed, "--model", "SimCLR", "--trainer.enable_checkpointing", "true", "--data.batch_size", "128",
            "--trainer.max_epochs", "30", "--data.track_test", "false", folder=folder,
        )  # fmt: skip
        return str(next(folder.rglob("*.ckpt")))


def write_probe() -> None:
    """Write the true labels of the first ten training images of each class, unless it is done."""
    PROBE.parent.mkdir(parents=True, exist_ok=True)
    with awaited(PROBE):
        if not PROBE.exists():
            labels = Digits(image_size=16).load_train().labels
            known = [(labels == label).nonzero()[:10, 0] for label in range(10)]
            rows = [f"{index},{label}" for label, part in enumerate(known) for index in part.tolist()]
            PROBE.write_text("\n".join(["index,label", *rows]) + "\n")


def words_of(method: str, noise: str, masked: bool, pretrained: str = "ENCODER", variant: str = "sanm") -> list[str]:
    """Return the options of a run; ``pretrained`` is the checkpoint of C2D."""
    _, rate, options = NOISES[noise]
    values = {"RATE": rate, "ENCODER": pretrained, "PROBE": str(PROBE)}
    model = ["--model", CLASSES.get(method, method), *(values.get(word, word) for word in METHODS[method])]
    published = ASYMMETRIC if noise == "asym40" and method in ("DivideMix", "C2D", "AugDesc") else []
    extra = VARIANTS[variant] if masked or variant == "longer" else []
    return [*(SANM if masked else []), *model, *published, "--data.noise", options, *extra]


def run(method: str, noise: str, seed: int, masked: bool, runs: Path, variant: str = "sanm") -> None:
    """Run one line of the study and record it, unless it is recorded or another process runs it."""
    row = row_name(method, masked, variant)
    folder = runs / f"{row.replace(' ', '_')}_{noise}_{seed}"
    with reserved(folder) as free:
        if not free or str(seed) in recorded(RESULTS).get(noise, {}).get(row, {}):
            return
        pretrained = encoder(seed, runs) if "ENCODER" in METHODS[method] else "ENCODER"
        if pretrained is None:
            print(f"{folder.name}: another process pre-trains; run the command again", flush=True)
            return
        if "PROBE" in METHODS[method]:
            write_probe()
        result = fit(seed, *words_of(method, noise, masked, pretrained, variant), folder=folder)
        kept = ("test_accuracy_best", "test_accuracy_last", "quality_auc", "seconds", "stages")
        record(RESULTS, STUDY, (noise, row, str(seed)), {key: result.get(key) for key in kept})
        print(f"{folder.name}: {result['test_accuracy_last']:.3f}", flush=True)


def table(runs: dict[str, Any]) -> str:
    """Return the last test accuracies as a Markdown table: means over seeds, each seed, and the gain on the seeds of both."""
    lines = ["| labels | method | seeds | last alone | last, SANM | gain | quality AUC |", "|" + "---|" * 7]
    for noise, (title, _, _) in NOISES.items():
        for method in METHODS:
            alone, masked = (runs.get(noise, {}).get(row_name(method, under), {}) for under in (False, True))
            if alone or masked:
                both = sorted(alone.keys() & masked.keys())
                gains = [masked[seed]["test_accuracy_last"] - alone[seed]["test_accuracy_last"] for seed in both]
                aucs = [result["quality_auc"] for result in masked.values() if result["quality_auc"] is not None]
                seeds = " ".join(sorted(alone.keys() | masked.keys()))
                gain = f"{statistics.mean(gains):+.3f}" if gains else ""
                auc = decimals(statistics.mean(aucs)) if aucs else ""
                lines.append(f"| {title} | `{method}` | {seeds} | {cell(alone)} | {cell(masked)} | {gain} | {auc} |")
    return "\n".join(lines)


def variants_table(runs: dict[str, Any], noise: str = "sym50") -> str:
    """Return the last test accuracies of SANM's variants as a Markdown table, of the methods of which a variant was run."""
    found = runs.get(noise, {})
    lines = ["| method | | seeds | last |", "|" + "---|" * 4]
    for method in METHODS:
        if any(row_name(method, True, variant) in found for variant in list(VARIANTS)[1:]):
            for title, (variant, masked) in VARIANT_ROWS.items():
                if by_seed := found.get(row_name(method, masked, variant), {}):
                    lines.append(f"| `{method}` | {title} | {' '.join(sorted(by_seed))} | {cell(by_seed)} |")
    return "\n".join(lines)


def cell(by_seed: dict[str, Any]) -> str:
    """Return the mean of the last accuracies and, in brackets, those of the seeds."""
    last = [by_seed[seed]["test_accuracy_last"] for seed in sorted(by_seed)]
    return f"{decimals(statistics.mean(last))} ({' '.join(map(decimals, last))})" if last else "not run"


def main() -> None:
    """Run the methods, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=["sym50"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sanm"])
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_methods"))
    parser.add_argument("--table", action="store_true", help="print the table of the results file")
    options = parser.parse_args()
    if not options.table:
        options.runs.mkdir(parents=True, exist_ok=True)
        calls = [
            partial(run, method, noise, seed, masked, options.runs, variant)
            for seed in options.seeds
            for noise in options.noise
            for method in options.methods
            for variant in options.variants
            for masked in (False, True)
        ]
        failed = in_turn(options.jobs, calls)
        if failed:
            raise SystemExit("\n".join(["failed:", *failed]))
    print(table(recorded(RESULTS)))


if __name__ == "__main__":
    main()
