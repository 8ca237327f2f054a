"""Share of the device's matrix rate that training reaches (MFU: model FLOPs utilization)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import DEVICE, medians
from benchmarks.step import batch_of, network_of
from sanm_lightning import SANM

PRECISIONS = ("bf16", "tf32", "fp32")


@contextlib.contextmanager
def tensor_cores(name: str) -> Iterator[None]:
    """Context manager that allows TF32 for the precision ``"tf32"`` only."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def matrix_rate(name: str = "bf16", size: int = 8192, repeats: int = 30) -> float:
    """Return floating-point operations per second of a product of two matrices of ``size`` rows and columns."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    one, other = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    with tensor_cores(name):
        return 2 * size**3 / medians({"product": lambda: one @ other}, repeats, warm=5)["product"]


def training_rate(
    batch_size: int, masked: bool, name: str = "bf16", mode: str | None = None, width: int = 64, repeats: int = 50
) -> dict[str, float]:
    """Return operations and seconds of a training step of PreAct ResNet-18, and its peak memory.

    Args:
        batch_size: number of 32 x 32 images per step.
        masked: whether cross-entropy is under SANM, whose pass over the unmasked images counts as operations.
        name: a name in :data:`PRECISIONS`.
        mode: mode of ``torch.compile``; None does not compile.
        width: width of the network.
        repeats: number of timed steps.
    """
    images, targets, quality = batch_of(batch_size)
    network, sanm = network_of(width), SANM(seed=0) if masked else SANM.off()
    sanm.build(network, (32, 32))
    sanm.to(DEVICE)
    optimizer = torch.optim.SGD([*network.parameters(), *sanm.parameters()], lr=1e-4, momentum=0.9)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=name == "bf16"):
            views = sanm(network, images, targets, lambda logits: quality)
            features = network.forward_features(views.images)
            loss = F.cross_entropy(network.forward_head(features), views.targets)
            loss = loss + sanm.reconstruction(features, images)
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    if mode is not None:
        for half in ("forward_features", "forward_head"):
            setattr(network, half, torch.compile(getattr(network, half), mode=mode))
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tensor_cores(name):
        seconds = medians({"step": step}, repeats, warm=10)["step"]
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    return {
        "flop": counter.get_total_flops(),
        "step_s": seconds,
        "images_per_s": batch_size / seconds,
        "peak_bytes": peak,
    }


def run(repeats: int) -> dict[str, Any]:
    """Return the measured matrix rate and the share of it in cross-entropy and SANM, by batch size, compiled or not."""
    rate = matrix_rate()
    rows = {"matrix_flop_per_s": rate}
    for batch_size in (128, 512):
        for mode in (None, "default", "max-autotune"):  # the last one captures graphs
            for masked in (False, True):
                found = training_rate(batch_size, masked, mode=mode, repeats=10 * repeats)
                label = f"{'sanm' if masked else 'cross_entropy'}_{batch_size}_{mode or 'eager'}"
                rows[f"mfu_{label}"] = found["flop"] / found["step_s"] / rate
    return rows
