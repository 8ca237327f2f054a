"""A long run in miniature: 200 epochs on toy data must not grow in memory or open files.

    python tests/soak.py [--epochs 200] [--methods CrossEntropy DivideMix ...] [--device cpu]

Not collected as a test. Memory is the resident size of the process (and what torch holds on the device), files are its open
descriptors; both are read at the end of every epoch, after a warm-up of a fifth of the epochs. Checkpoints, results, metrics
and decoding in this process take part as in any run.
"""

import argparse
import gc
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sanm_lightning import SANM, Noise, methods
from sanm_lightning.data import Toy
from sanm_lightning.run.record import RunRecord
from sanm_lightning.safe_files import AtomicCheckpointIO

OPTIONS: dict[str, dict[str, Any]] = {
    "CrossEntropy": {}, "CoTeaching": {"noise_rate": 0.4}, "CDR": {"noise_rate": 0.4}, "ELR": {}, "ELRPlus": {},
    "DivideMix": {"loss_history": 5}, "SSR": {"k": 5},
}  # fmt: skip


class Watch(L.Callback):
    """Note resident memory in MiB, device memory in MiB, and open files, once per epoch."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.rows.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, device / 2**20, len(os.listdir("/proc/self/fd"))))


def soak(name: str, epochs: int, device: str) -> tuple[str, bool]:
    """Run; return the figures, and whether they are flat."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    watch = Watch()
    small = {"network": "small_cnn", "network_args": {"width": 8}, "num_classes": 4, "image_size": (16, 16)}
    module = getattr(methods, name)(**small, **OPTIONS[name], sanm=SANM(mu=0.5, seed=0), warmup_epochs=2)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator=device, devices=1, logger=CSVLogger(folder), default_root_dir=folder,
        callbacks=[RunRecord(), ModelCheckpoint(folder, save_last=True, every_n_epochs=1), watch],
        plugins=[AtomicCheckpointIO()], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Toy(num_samples=64, seed=0, noise=Noise("symmetric_exclusive", 0.4)))
    rows = watch.rows[epochs // 5 :]
    half = len(rows) // 2
    host = [max(row[0] for row in part) for part in (rows[:half], rows[half:])]
    held = [max(row[1] for row in part) for part in (rows[:half], rows[half:])]
    files = [row[2] for row in rows]
    flat = host[1] - host[0] < 5 and held[1] - held[0] < 1 and max(files) == min(files)
    figures = (
        f"{name}: host {host[0]:.1f} -> {host[1]:.1f} MiB, device {held[0]:.2f} -> {held[1]:.2f} MiB, open files "
        f"{min(files)} to {max(files)} over epochs {epochs // 5} to {epochs}: {'flat' if flat else 'GROWS'}"
    )
    return figures, flat


def main() -> None:
    """Parse arguments, run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=list(OPTIONS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    flat = []
    for name in options.methods:
        figures, well = soak(name, options.epochs, options.device)
        print(figures, flush=True)
        flat.append(well)
    sys.exit(not all(flat))


if __name__ == "__main__":
    main()
