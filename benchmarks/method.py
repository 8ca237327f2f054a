"""One method, alone or under SANM, in a process of its own: seconds of an epoch, where they go, peak memory.

``python -m benchmarks.method DivideMix --sanm`` prints one line of JSON.
"""

import argparse
import json
import resource
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch

from benchmarks.measure import DEVICE, wait
from sanm_lightning import SANM, Noise, methods
from sanm_lightning.data import Toy

WORDS: dict[str, dict[str, Any]] = {
    "SSR": {"k": 20},
    "CDR": {"noise_rate": 0.2},
    "CoTeaching": {"noise_rate": 0.2},
    "C2D": {"pretrained": "ENCODER"},
}
METHODS = ["CrossEntropy", "CoTeaching", "CDR", "ELR", "ELRPlus", "DivideMix", "C2D", "SSR", "GCE"]


class Clock(L.Callback):
    """Add up what passes inside the networks, the decoders, backward and the optimizer; the rest of an epoch is outside.

    On a GPU every part is waited for, which keeps parts from overlapping: the share outside is an upper bound.
    """

    def __init__(self) -> None:
        self.inside, self.depth, self.epochs = 0.0, 0, []
        self._started = self._inside_before = 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Time all calls of ``owner.name``."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return method(*args, **kwargs)
            wait()
            self.depth, start = 1, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                wait()
                self.depth = 0
                self.inside += time.perf_counter() - start

        setattr(owner, name, timed)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look for what there is to time."""
        networks = [*pl_module.networks, *(teacher.module for teacher in getattr(pl_module, "teachers", []))]
        for network in networks:
            for half in ("forward_features", "forward_head"):
                self.watch(network, half)
        for part in pl_module.modules():
            if isinstance(part, SANM) and part.decoder is not None:
                self.watch(part.decoder, "forward")
        self.watch(trainer.strategy, "backward")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin to count. The optimizer exists by now; its step is timed without the closure that Lightning hands it."""
        if not self.epochs:
            for optimizer in trainer.optimizers:
                self._watch_step(optimizer)
        wait()
        self._started, self._inside_before = time.perf_counter(), self.inside

    def _watch_step(self, optimizer: Any) -> None:
        step = optimizer.step

        def timed(closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            start = time.perf_counter()
            step()
            wait()
            self.inside += time.perf_counter() - start
            return loss

        optimizer.step = timed

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note seconds of the epoch and of what passed inside."""
        wait()
        self.epochs.append((time.perf_counter() - self._started, self.inside - self._inside_before))


def peak_bytes() -> int:
    """Return the most memory so far: of the device, or of this process."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Train a few epochs and print what they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--sanm", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    words = dict(WORDS.get(options.method, {}))
    network = {"network": "preact_resnet18", "network_args": {"width": options.width}, "num_classes": 10}
    if "pretrained" in words:
        words["pretrained"] = "runs/bench_encoder.pt"
        encoder = methods.CrossEntropy(**network)
        torch.save({"state_dict": encoder.state_dict()}, words["pretrained"])
    module = getattr(methods, options.method)(
        **network, **words, warmup_epochs=1, sanm=SANM(seed=0) if options.sanm else None
    )
    data = Toy(
        num_samples=options.samples, num_classes=10, image_size=32, seed=0, track_test=False,
        noise=Noise("symmetric_exclusive", 0.5), batch_size=128, crop_padding=4,
    )  # fmt: skip
    clock, before = Clock(), peak_bytes()
    trainer = L.Trainer(
        max_epochs=options.epochs, accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
        precision="bf16-mixed" if DEVICE.type == "cuda" else "32-true",
    )  # fmt: skip
    trainer.fit(module, data)
    whole, inside = clock.epochs[-1]  # of the last epoch: everything is warm, and masks are drawn
    print(json.dumps({
        "method": options.method, "sanm": options.sanm, "width": options.width, "samples": options.samples,
        "epoch_s": whole, "outside_share": 1 - inside / whole, "peak_bytes": peak_bytes() - before,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
