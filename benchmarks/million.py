"""``python -m benchmarks.million``: time to the first training step, and memory, of a Clothing1M layout by number of images.

Each size runs in a process of its own: lists of N paths in the official format, of which each leads to one of 100 files
through linked folders; 2 workers; two epochs of 1,400 streamed images each, with SANM over cross-entropy and with
DivideMix, whose tables have N rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILES, SIDE, PER_EPOCH = 100, 36, 1400
CLASSES = 14


def create(root: Path, count: int) -> None:
    """Write lists of ``count`` training images, and the files."""
    import numpy as np
    from PIL import Image

    real = root / "images" / "real"
    real.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [f"{n:010d},{n:09d}.jpg" for n in range(FILES)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(real / name)
    for folder in range(-(-count // FILES)):
        (root / "images" / f"{folder % 10}").mkdir(exist_ok=True)
        (root / "images" / f"{folder % 10}" / f"{folder:05d}").symlink_to(real, target_is_directory=True)
    order = random.permutation(count)
    labels = random.choice(CLASSES, count, p=random.dirichlet(np.full(CLASSES, 5.0)))
    keys = [f"images/{n // FILES % 10}/{n // FILES:05d}/{names[n % FILES]}" for n in order.tolist()]
    (root / "noisy_train_key_list.txt").write_text("\n".join(keys) + "\n")
    rows = [f"{key} {label}" for key, label in zip(reversed(keys), labels.tolist(), strict=True)]
    (root / "noisy_label_kv.txt").write_text("\n".join(rows) + "\n")
    few = [f"images/real/{name}" for name in names[:CLASSES]]
    for split in ("val", "test"):
        (root / f"clean_{split}_key_list.txt").write_text("\n".join(few) + "\n")
    (root / "clean_label_kv.txt").write_text("\n".join(f"{key} {n}" for n, key in enumerate(few)) + "\n")


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(root: Path) -> dict[str, Any]:
    """Fit in this process; return seconds and bytes."""
    began, bare = time.perf_counter(), peak()
    import lightning as L
    import torch

    from sanm_lightning import SANM, Clothing1M, CrossEntropy, DivideMix
    from sanm_lightning.run.record import RunRecord

    class First(L.Callback):
        """Note when the first step begins."""

        seconds = 0.0

        def on_train_batch_start(self, *_: Any) -> None:
            self.seconds = self.seconds or time.perf_counter() - start

    imported, imports_s = peak(), time.perf_counter() - began
    small = {"num_classes": CLASSES, "image_size": (32, 32), "network": "small_cnn", "network_args": {"width": 8}}
    found: dict[str, Any] = {"bytes_imported": imported - bare, "imports_s": imports_s}
    for name, create_module in (
        ("sanm", lambda: CrossEntropy(**small, warmup_epochs=1, sanm=SANM(seed=0))),
        ("dividemix", lambda: DivideMix(**small, warmup_epochs=1)),
    ):
        start, first = time.perf_counter(), First()
        torch.manual_seed(0)
        data = Clothing1M(
            str(root), samples_per_epoch=PER_EPOCH, image_size=32, decode_size=SIDE, batch_size=100, num_workers=2,
            resident_bytes=0, track_test=False,
        )  # fmt: skip
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[first, RunRecord()],
            default_root_dir=str(root / name),
        )  # fmt: skip
        module = create_module()
        trainer.fit(module, data)
        assert trainer.global_step == 2 * PER_EPOCH // 100
        found[name] = {
            "first_step_s": first.seconds, "fit_s": time.perf_counter() - start, "bytes_beyond_interpreter": peak() - bare,
            "labels_npz_bytes": (root / name / "labels.npz").stat().st_size,
        }  # fmt: skip
        del data, trainer, module
    return found


def main() -> None:
    """Measure each size in a fresh process, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path("runs/million.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    rows: dict[str, Any] = {}
    for count in options.samples:
        with tempfile.TemporaryDirectory() as folder:
            create(Path(folder), count)
            words = [sys.executable, "-W", "ignore", "-m", "benchmarks.million", "--measure", folder]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        rows[str(count)] = json.loads(done.stdout.splitlines()[-1])
        print(count, json.dumps(rows[str(count)]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
