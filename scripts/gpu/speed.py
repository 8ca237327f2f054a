"""Speed on a GPU: ``python -m scripts.gpu.speed``, a part of ``scripts/on_gpu.py``."""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks import device_rate, transforms
from benchmarks.measure import wait
from scripts.gpu.cases import FULL, TINY, Case, Size, cases, data, trainer
from scripts.gpu.options import parse
from scripts.gpu.report import Check, run_checks

CIFAR10_SAMPLES = 50_000


def checks(options: argparse.Namespace) -> Iterator[Check]:
    """Return the measurements of this part."""
    tiny, size = options.tiny, TINY if options.tiny else FULL
    for batch_size in (8, 16) if tiny else (128, 512):
        for precision in ("bf16", "fp32") if tiny else device_rate.PRECISIONS:
            for masked in (False, True):
                name = f"mfu/{precision}/{batch_size}/{'SANM(CrossEntropy)' if masked else 'CrossEntropy'}"
                yield Check(name, partial(utilization, batch_size, masked, precision, None, tiny))
    yield Check("transforms", partial(transforms.run, 1 if tiny else 9, 4 if tiny else 128))
    for case in cases(options.methods):
        yield Check(f"epoch/{case.label}", partial(epoch, case, size, options.device))
    for masked in (False, True):
        name = f"mfu/bf16_compiled/512/{'SANM(CrossEntropy)' if masked else 'CrossEntropy'}"
        yield Check(name, partial(utilization, 512, masked, "bf16", "default", tiny), needs_cuda=True)


@cache
def matrix_rate(precision: str, tiny: bool) -> float:
    """Return floating-point operations per second of a matrix product, measured once."""
    return device_rate.matrix_rate(precision, *((256, 3) if tiny else ()))


def utilization(batch_size: int, masked: bool, precision: str, mode: str | None, tiny: bool) -> dict[str, float]:
    """Return the share of the matrix rate in a training step (MFU), its speed, and its peak memory."""
    rate = matrix_rate(precision, tiny)
    width, repeats = (4, 2) if tiny else (64, 50)
    found = device_rate.training_rate(batch_size, masked, precision, mode, width, repeats)
    return {"mfu": found["flop"] / found["step_s"] / rate, "matrix_flop_per_s": rate, **found}


class EpochClock(L.Callback):
    """Time whole epochs, with the passes over the set at their beginning; the device is waited for between epochs."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        wait()
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock for an epoch, and start it for the next one."""
        wait()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def epoch(case: Case, size: Size, device: str) -> dict[str, Any]:
    """Train a few epochs on a small set, and extrapolate the last one linearly to the 50,000 images of CIFAR-10.

    The last epoch has masks and is warm. What is done once per epoch and does not grow with the set is overestimated; the
    neighbor search of SSR, which grows with its square, is underestimated.
    """
    clock = EpochClock()
    on_cuda = device == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    precision = "bf16-mixed" if on_cuda else "32-true"
    with tempfile.TemporaryDirectory() as folder:
        module = case.build(size, Path(folder))
        trainer(device, 4, callbacks=[clock], precision=precision).fit(module, data(size))
    last = clock.seconds[-1]
    return {
        "samples": size.samples, "batch_size": size.batch_size, "network": f"{size.network}, width {size.width}",
        "precision": precision, "epoch_s": last, "step_s": last / (size.samples // size.batch_size),
        "cifar10_epoch_s": last * CIFAR10_SAMPLES / size.samples,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    }  # fmt: skip


def main() -> None:
    """Run the measurements of this part."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = parse(part=True)
    run_checks("speed", list(checks(options)), options)


if __name__ == "__main__":
    main()
