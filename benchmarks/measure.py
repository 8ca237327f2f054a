"""Timing: runs in turn, medians."""

import statistics
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Let the device finish."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Return how long one call takes."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def medians(runs: dict[str, Callable[[], object]], repeats: int = 9, warm: int = 1) -> dict[str, float]:
    """Call each in turn, again and again; return the median seconds of each. Drift of the machine meets all alike."""
    for _ in range(warm):
        for run in runs.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    return {name: statistics.median(times) for name, times in taken.items()}
