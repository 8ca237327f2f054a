"""Train on handwritten digits with half of the labels wrong, with cross-entropy and with cross-entropy under SANM.

It runs two command lines and prints a table of their results:

    sanm fit --config configs/quickstart.yaml
    sanm fit --config configs/quickstart.yaml --config configs/quickstart_sanm.yaml

with --trainer.default_root_dir runs/quickstart/cross_entropy and runs/quickstart/sanm.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sanm_lightning.cli import main

RUNS = {"cross_entropy": [], "sanm": ["--config", "configs/quickstart_sanm.yaml", "--trainer.callbacks+=SANMPictures"]}


def train(name: str, seed: int, extra: list[str]) -> dict:
    directory = Path("runs/quickstart") / (name if seed == 1 else f"{name}_seed{seed}")
    print(f"\n{name}: writes to {directory}", flush=True)
    common = ["fit", "--config", "configs/quickstart.yaml", "--seed_everything", str(seed)]
    main([*common, *RUNS[name], "--trainer.default_root_dir", str(directory), *extra])
    return json.loads((directory / "results.json").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the rest of the command line goes to `sanm fit`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options, rest = parser.parse_known_args()
    sys.argv[1:] = []
    torch.set_num_threads(1)  # a second thread is of little use for small images, and slow on a busy machine
    table = Table(
        title="Digits, half of the training labels wrong", caption="best: highest of all epochs on the test set"
    )
    for column in ("method", "seed", "best", "last", "quality AUC", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for seed in options.seeds:
        for name in RUNS:
            result = train(name, seed, rest)
            auc = result["quality_auc"]
            table.add_row(
                name,
                str(seed),
                f"{result['test_accuracy_best']:.3f}",
                f"{result['test_accuracy_last']:.3f}",
                "" if auc is None else f"{auc:.3f}",
                f"{result['seconds']:.1f}",
            )
    Console().print(table)
