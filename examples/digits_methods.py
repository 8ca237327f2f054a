"""Train every method on handwritten digits with wrong labels, alone and under SANM, and print a table.

    python examples/digits_methods.py --seeds 1 2 3 --rates 0.5 0.8

Each row is a command line on the recipe of the quickstart, of this form (C2D pre-trains with SimCLR first):

    sanm fit --config configs/quickstart.yaml [--config configs/sanm.yaml] --data.image_size 16 \
        --model METHOD --data.noise.rate RATE

Results are written to runs/digits_methods/*/results.json; runs with existing results are skipped.
IEG uses the true labels of ten training images per class.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sanm_lightning import Digits
from sanm_lightning.cli import main

HOME = Path("runs/digits_methods")
METHODS = {  # options in addition to the recipe; two methods require the noise rate, as published
    "CrossEntropy": [],
    "CoTeaching": ["--model.noise_rate", "RATE", "--model.num_gradual", "3"],
    "CDR": ["--model.noise_rate", "RATE"],
    "ELR": [],
    "ELRPlus": ["--model.ema_ramp_steps", "400"],
    "DivideMix": ["--model.ramp_epochs", "4"],
    "C2D": ["--model.ramp_epochs", "4", "--model.pretrained", "ENCODER"],
    "SSR": ["--model.k", "20", "--model.warmup_epochs", "0"],
    "GCE": [],
    "Mixup": ["--model.alpha", "8"],
    "ForwardCorrection": ["--model.warmup_epochs", "15"],
    "MCorrection": ["--model.warmup_epochs", "15"],
    "CoTeachingPlus": ["--model.noise_rate", "RATE", "--model.num_gradual", "3", "--model.warmup_epochs", "5"],
    "PENCIL": ["--model.warmup_epochs", "8", "--model.finetune_lr", "0.005"],
    "JointOptim": ["--model.warmup_epochs", "8", "--model.retrain_lr", "0.005"],
    "PLC": ["--model.warmup_epochs", "8"],
    "SELFIE": ["--model.noise_rate", "RATE", "--model.warmup_epochs", "8", "--model.history", "5"],
    "ActiveBias": ["--model.warmup_epochs", "8"],
    "MLNT": [
        "--model.warmup_epochs",
        "8",
        "--model.meta_lr",
        "0.2",
        "--model.meta_weight",
        "0.4",
        "--model.ramp_steps",
        "200",
    ],
    "MetaCleaner": [],  # a method after MetaCleaner, which has no released code
    "IEG with 100 known labels": ["--model.probe", "PROBE"],  # not comparable with methods without known labels
    "GCE truncated": ["--model.truncation", "0.5", "--model.prune_every", "5", "--model.warmup_epochs", "15"],
}


def fit(home: Path, seed: int, *words: str) -> dict:
    """Run one command line, unless its results exist."""
    record = home / "results.json"
    if not record.exists():
        print(f"{home}", flush=True)
        common = [
            "fit",
            "--config",
            "configs/quickstart.yaml",
            "--data.image_size",
            "16",
            "--seed_everything",
            str(seed),
        ]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        main([*common, *words, *quiet, "--trainer.default_root_dir", str(home)])
    return json.loads(record.read_text())


def encoder(seed: int) -> str:
    """Pre-train without labels; return the checkpoint."""
    home = HOME / f"SimCLR_{seed}"
    words = [
        "--model",
        "SimCLR",
        "--trainer.enable_checkpointing",
        "true",
        "--data.batch_size",
        "128",
        "--trainer.max_epochs",
        "30",
    ]
    if not list(home.rglob("*.ckpt")):
        fit(home, seed, *words, "--data.track_test", "false")
    return str(next(home.rglob("*.ckpt")))


def probe() -> str:
    """Write the true labels of the first ten training images of each class; return the file."""
    file = HOME / "probe.csv"
    labels = Digits(image_size=16).load_train().labels
    known = [(labels == label).nonzero()[:10, 0] for label in range(10)]
    rows = [f"{index},{label}" for label, part in enumerate(known) for index in part.tolist()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["index,label", *rows]) + "\n")
    return str(file)


def words_of(method: str, rate: float, seed: int) -> list[str]:
    """Insert the noise rate, the encoder and the file of known labels."""
    found = {"RATE": lambda: str(rate), "ENCODER": lambda: encoder(seed), "PROBE": probe}
    return [found[word]() if word in found else word for word in METHODS[method]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    sys.argv[1:] = []
    torch.set_num_threads(1)
    table = Table(title="Digits, last test accuracy: mean over seeds (lowest to highest)")
    for column in ("noise", "method", "alone", "under SANM", "quality AUC"):
        table.add_column(column)
    for rate in options.rates:
        for method in options.methods:
            cells, auc = [], None
            for overlay in ([], ["--config", "configs/sanm.yaml"]):
                name = f"{method.replace(' ', '_')}{'_sanm' if overlay else ''}_{round(100 * rate)}"
                results = [
                    fit(
                        HOME / f"{name}_{seed}",
                        seed,
                        *overlay,
                        *("--model", method.split()[0], *words_of(method, rate, seed), "--data.noise.rate", str(rate)),
                    )
                    for seed in options.seeds
                ]
                last = [result["test_accuracy_last"] for result in results]
                cells.append(f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})")
                aucs = [result["quality_auc"] for result in results if result["quality_auc"] is not None]
                auc = f"{statistics.mean(aucs):.3f}" if aucs else ""
            table.add_row(f"{rate}", method, *cells, auc)
    Console().print(table)
