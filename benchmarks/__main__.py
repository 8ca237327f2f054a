"""``python -m benchmarks``: one table, and runs/bench.json."""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision
from rich.console import Console
from rich.table import Table

from benchmarks import device_rate, loaders, parts, step, streamed, transforms, views
from benchmarks.measure import DEVICE
from benchmarks.method import METHODS

SECTIONS = ["views", "transforms", "streamed", "loaders", "step", "methods", "parts", "device_rate"]


def methods(width: int, samples: int) -> dict[str, dict[str, Any]]:
    """Run each method alone and under SANM in a process of its own."""
    rows = {}
    for name in METHODS:
        for sanm in (False, True):
            words = [name, *(["--sanm"] if sanm else []), "--width", str(width), "--samples", str(samples)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.method", *words], check=True, stdout=subprocess.PIPE, text=True
            )
            row = json.loads(done.stdout.splitlines()[-1])
            rows[f"SANM({name})" if sanm else name] = row
            print(f"{name}{' under SANM' if sanm else ''}: {row['epoch_s']:.1f} s per epoch", flush=True)
    return rows


def table(found: dict[str, Any]) -> Table:
    """Lay the figures out, one per row."""
    out = Table("what", "figure")

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name} {key}".strip(), part)
        elif isinstance(value, float):
            out.add_row(name, f"{value:,.4g}")

    walk("", found)
    return out


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--width", type=int, default=64, help="of the PreAct ResNet-18 in steps")
    parser.add_argument("--method-width", type=int, default=64 if DEVICE.type == "cuda" else 16)
    parser.add_argument("--samples", type=int, default=50_000 if DEVICE.type == "cuda" else 1024, help="of methods")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    found["machine"] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "lightning": lightning.__version__,
    }  # fmt: skip
    todo: dict[str, Any] = {
        "views": lambda: views.run(options.repeats),
        "transforms": lambda: transforms.run(options.repeats),
        "streamed": lambda: streamed.run(options.repeats),
        "loaders": lambda: loaders.run(options.repeats),
        "step": lambda: step.run(options.repeats, options.width, 128),
        "methods": lambda: methods(options.method_width, options.samples),
        "parts": lambda: parts.run(options.repeats, 50_000),
        "device_rate": lambda: device_rate.run(options.repeats),
    }
    for section in options.only:
        if section == "device_rate" and DEVICE.type != "cuda":
            continue
        print(section, flush=True)
        found[section] = todo[section]()
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table({section: found[section] for section in options.only if section in found}))


if __name__ == "__main__":
    main()
