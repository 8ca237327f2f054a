"""CIFAR-10 at full size on a GPU: ``python -m scripts.gpu.training``, a part of ``scripts/on_gpu.py``."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sanm_lightning.data import CIFAR10
from scripts.gpu.decoded import decode
from scripts.gpu.options import parse
from scripts.gpu.report import NOT_RUN, REPOSITORY, Check, run_checks

MOST_EPOCHS = 300
RESERVE = 0.15
"""Fraction of the remaining time that is not planned for, since runs side by side vary."""
AUDIT_SHARE = 0.3
"""Fraction of the remaining time after which an audit is stopped."""
FIRST = ("cross_entropy", "sanm")
SLOWEST = 2.0
"""Epoch of another run over the longest epoch of :data:`FIRST` from which on the run is left out."""


NO_IMAGES = "expected decoded images, got none"


class Run(NamedTuple):
    """A command ``sanm fit``."""

    name: str
    words: tuple[str, ...]


class Training:
    """Runs of cross-entropy and SANM at 50 % symmetric noise, side by side on one device.

    Args:
        options: see :mod:`scripts.gpu.options`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = (options.work / "training").absolute()
        self.decoded = False
        self.audits: dict[int, Path] = {}
        self.epochs = 0
        self.left_out: dict[str, str] = {}
        self.seconds_per_epoch = 0.0
        self.seconds_to_start = 0.0

    def checks(self) -> Iterator[Check]:
        """Return the steps of this part."""
        yield Check("decode", self.decode)
        for seed in self.options.seeds:
            yield Check(f"audit/{seed}", partial(self.audit, seed))
        yield Check("calibration", self.calibrate)
        yield Check("fit", self.fit)

    def decode(self) -> dict[str, Any]:
        """Decode the images once for all runs; delete what earlier runs left."""
        shutil.rmtree(self.folder, ignore_errors=True)
        root = self.options.root
        if root is None:
            if not self.options.tiny:
                return not_run("expected a folder of images, got none; set --root")
            root = toy_images(self.folder / "images")
        images = decode(root, self.folder)
        self.decoded = True
        return {"images": images}

    def audit(self, seed: int) -> dict[str, Any]:
        """Audit the noisy labels with the pre-trained network, for label quality from its features."""
        if self.options.tiny or not self.decoded:
            return not_run("too slow for --tiny" if self.decoded else NO_IMAGES)
        out = self.folder / f"audit_{seed}"
        words = ["audit", *self._data(seed), "--out", str(out), "--device", self.options.device]
        left = (self.options.deadline - time.time()) * AUDIT_SHARE / len(self.options.seeds)
        self._finish([self._start(f"audit_{seed}", words)], time.time() + left)
        self.audits[seed] = out
        return {"noise_rate": json.loads((out / "audit.json").read_text()).get("noise_rate")}

    def runs(self, seed: int) -> list[Run]:
        """Return the runs of a seed."""
        sanm = ("--config", "configs/sanm.yaml")
        runs = [Run("cross_entropy", ()), Run("sanm", sanm)]
        if not self.options.tiny:
            runs.append(Run("sanm_network_features", ("--config", "configs/sanm/features.yaml")))
        if seed in self.audits:
            quality = {"class_path": "AuditQuality", "init_args": {"path": str(self.audits[seed])}}
            runs.append(Run("sanm_pretrained_features", (*sanm, "--model.sanm.quality", json.dumps(quality))))
        return runs

    def calibrate(self) -> dict[str, Any]:
        """Train two epochs of all runs side by side, and choose the number of epochs that fits the budget."""
        if not self.decoded:
            return not_run(NO_IMAGES)
        start = time.perf_counter()
        found = self._train("calibration", 2, 0)
        whole = time.perf_counter() - start
        seconds = {name: row["seconds"] / row["epochs"] for name, row in found.items() if row.get("epochs")}
        first = [
            seconds[name] for kind in FIRST for seed in self.options.seeds if (name := f"{kind}_seed_{seed}") in seconds
        ]
        if not first:
            raise RuntimeError(f"expected cross_entropy or sanm to train, got {found}; see the logs in {self.folder}")
        self.left_out = {
            name: "failed" if name not in seconds else f"an epoch of {seconds[name]:.1f} s"
            for name in found if name not in seconds or seconds[name] > SLOWEST * max(first)
        }  # fmt: skip
        self.seconds_per_epoch = max(value for name, value in seconds.items() if name not in self.left_out)
        self.seconds_to_start = max(0.0, whole - 2 * max(seconds.values()))
        left = self.options.deadline - time.time()
        planned = (left * (1 - RESERVE) - self.seconds_to_start) / self.seconds_per_epoch
        self.epochs = 3 if self.options.tiny else int(max(0, min(MOST_EPOCHS, planned)))
        return {
            "runs_side_by_side": len(found), "seconds_per_epoch": self.seconds_per_epoch,
            "seconds_to_start": self.seconds_to_start, "epochs": self.epochs, "left_out": self.left_out, "runs": found,
        }  # fmt: skip

    def fit(self) -> dict[str, Any]:
        """Train all runs side by side for the chosen number of epochs."""
        if self.epochs < 3:
            return {
                "status": NOT_RUN,
                "reason": f"expected time for 3 epochs or more, got {self.epochs}; raise --budget",
            }
        warmup = min(10, max(1, self.epochs // 5))
        found = self._train("fit", self.epochs, warmup)
        return {
            "epochs": self.epochs, "warmup_epochs": warmup, "rate_divided_by_10_at_epoch": self.epochs // 2,
            "published_epochs": MOST_EPOCHS, "noise": "configs/noise/sym50.yaml", "runs": found,
            "passed": all(row["exit_status"] == 0 for row in found.values()),
        }  # fmt: skip

    def _data(self, seed: int) -> list[str]:
        """Return the data set and its noise, which audit and fit share."""
        noise = ["--data.noise", "{kind: symmetric, rate: 0.5}"]
        where = ["--data", "scripts.gpu.decoded.DecodedCIFAR10", "--data.root", str(self.folder)]
        return [*where, "--data.seed", str(seed), *noise]

    def _train(self, kind: str, epochs: int, warmup: int) -> dict[str, dict[str, Any]]:
        """Train all runs side by side, and return what each of them wrote."""
        cuda, tiny = self.options.device == "cuda", self.options.tiny
        common = [
            "--trainer.max_epochs", str(epochs), "--trainer.accelerator", "gpu" if cuda else "cpu", "--trainer.devices", "1",
            "--trainer.precision", "bf16-mixed" if cuda else "32-true", "--trainer.enable_progress_bar", "false",
            "--trainer.logger", "false", "--audit", "false", "--model.warmup_epochs", str(warmup),
            "--model.scheduler.milestones", f"[{max(1, epochs // 2)}]",
        ]  # fmt: skip
        if tiny:
            common += ["--model.network", "small_cnn", "--model.network_args", "{width: 4}", "--data.batch_size", "16"]
        started = {}
        for seed in self.options.seeds:
            for run in self.runs(seed):
                name = f"{run.name}_seed_{seed}"
                if name in self.left_out:
                    continue
                place = ["--trainer.default_root_dir", str(self.folder / kind / name), "--seed_everything", str(seed)]
                method = ["fit", "--config", "configs/method/cross_entropy.yaml", *self._data(seed), *run.words]
                started[name] = self._start(f"{kind}_{name}", [*method, *common, *place])
        self._finish(list(started.values()), self.options.deadline, check=False)
        return {name: self._results(kind, name, process) for name, process in started.items()}

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a command of ``sanm``, whose output goes to a file of this name."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "sanm_lightning", *words]
            threads = str(max(1, (os.cpu_count() or 1) // (4 * len(self.options.seeds))))
            environment = {"OMP_NUM_THREADS": threads, **os.environ}
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=environment)
        process.log = Path(log.name)  # type: ignore[attr-defined]
        return process

    def _finish(self, processes: list[subprocess.Popen[bytes]], deadline: float, check: bool = True) -> None:
        """Wait for processes until a deadline, and stop those that are still running.

        Raises:
            RuntimeError: with ``check``, if a process failed.
        """
        try:
            for process in processes:
                left = None if deadline == float("inf") else max(0.0, deadline - time.time())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(left)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        for process in processes:
            if check and process.returncode:
                raise RuntimeError(f"expected exit status 0, got {process.returncode}: {tail(process)}")

    def _results(self, kind: str, name: str, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Return what a run wrote; a stopped run has the results of its last evaluation."""
        path = self.folder / kind / name / "results.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        keys = ("epochs", "seconds", "measured_noise_rate", "test_accuracy_best", "test_accuracy_last",
                "test_accuracy_last10", "quality_auc", "masked_steps")  # fmt: skip
        row = {"exit_status": process.returncode, **{key: found[key] for key in keys if key in found}}
        return row if process.returncode == 0 else {**row, "log": tail(process)}


def not_run(reason: str) -> dict[str, Any]:
    """Return the entry of a step that is not run."""
    return {"status": NOT_RUN, "reason": reason}


def tail(process: Any) -> str:
    """Return the end of the output of a process."""
    return str(process.log.read_text()[-500:])


def toy_images(root: Path) -> Path:
    """Write a few images of one color per class as JPEG files, and return their folder."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 2)):
        for number, name in enumerate(CIFAR10.names):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for row in range(count):
                noise = torch.randint(60, (32, 32, 3), generator=generator)
                color = torch.tensor([number * 19, 190 - number * 19, (number * 57) % 190])
                Image.fromarray((noise + color).to(torch.uint8).numpy()).save(folder / f"{row}.jpg")
    return root


def main() -> None:
    """Run this part."""
    options = parse(part=True)
    run_checks("training", list(Training(options).checks()), options)


if __name__ == "__main__":
    main()
