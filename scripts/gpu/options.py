"""Command line of ``scripts/on_gpu.py`` and of its parts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

PARTS = {"correctness": 0.25, "speed": 0.25, "training": 0.5}
"""Parts in their order, with the fraction of the budget after which a part has to end; unused time passes on."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all options."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = argparse.ArgumentParser(description="Check correctness, speed and training on a GPU, and write JSON files.")
    out.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    out.add_argument("--device", choices=["cuda", "cpu"], default=device)
    out.add_argument("--tiny", action="store_true", help="small networks and sets: every part in minutes on a CPU")
    out.add_argument("--budget", type=float, default=1800.0, help="seconds for all parts")
    out.add_argument("--root", type=Path, help="folder with train/<class>/ and test/<class>/ of the CIFAR-10 images")
    out.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the training runs")
    out.add_argument("--methods", nargs="+", help="methods to check. Default: all")
    out.add_argument("--only", nargs="+", help="names of checks, or their beginnings, such as step/ELR. Default: all")
    out.add_argument(
        "--out", type=Path, help="folder of the JSON files. Default: results/gpu, or runs/on_gpu without a GPU"
    )
    out.add_argument("--work", type=Path, default=Path("runs/on_gpu"), help="folder of decoded images and of runs")
    return out


def parse(words: Sequence[str] | None = None, part: bool = False) -> argparse.Namespace:
    """Parse the options, with the defaults that depend on others.

    Args:
        words: arguments; None reads ``sys.argv``.
        part: whether the arguments are those of a part, which has a ``deadline``, in seconds since the epoch.

    Returns:
        The options.
    """
    made = parser()
    if part:
        made.add_argument("--deadline", type=float, default=float("inf"))
    options = made.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("expected a CUDA device for --device cuda, got none; use --device cpu --tiny")
    if options.out is None:
        measured = options.device == "cuda" and not options.tiny
        options.out = Path("results/gpu" if measured else "runs/on_gpu")
    return options
