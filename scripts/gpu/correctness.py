"""Correctness on a GPU: ``python -m scripts.gpu.correctness``, a part of ``scripts/on_gpu.py``."""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from sanm_lightning import methods
from sanm_lightning.models import SmallCNN
from scripts.gpu.cases import SMALL, TINY, Case, Size, cases, data, trainer
from scripts.gpu.one_step import Step, difference, start, step
from scripts.gpu.options import parse
from scripts.gpu.report import Check, run_checks

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 2e-3
"""Relative error of all gradients together, in fp32 without TF32; a mask at another place has an error above .1."""


def checks(options: argparse.Namespace) -> Iterator[Check]:
    """Return the checks of this part."""
    size, device = TINY if options.tiny else SMALL, options.device
    cross_entropy = [Case("CrossEntropy", False), Case("CrossEntropy", True)]
    yield Check("dropout_resume", partial(dropout_resume, device))
    backend = "nccl" if device == "cuda" else "gloo"
    for case in cross_entropy:
        yield Check(f"one_process_{backend}/{case.label}", partial(one_process, case, size, device, backend))
    for case in cases(options.methods):
        yield Check(f"step/{case.label}", partial(cpu_against_device, case, size, device))
    for case in cases(options.methods):
        yield Check(f"no_synchronization/{case.label}", partial(no_synchronization, case, size), needs_cuda=True)
    for case in cases(options.methods):
        yield Check(f"bf16_mixed/{case.label}", partial(finite_in_bf16, case, size, device))
    compiler = "aot_eager" if options.tiny else "inductor"
    for case in cross_entropy:
        yield Check(f"compile_{compiler}/{case.label}", partial(compiled, case, size, device, compiler))


# One step, two ways ----------------------------------------------------------------------------------------------------


def cpu_against_device(case: Case, size: Size, device: str) -> dict[str, Any]:
    """Compare loss and gradients of a step on the CPU with those on the device, for the same weights and batch."""
    with tempfile.TemporaryDirectory() as folder, without_tf32():
        path = start(case, size, Path(folder))
        expected = step(case, size, path, "cpu")
        return compared(expected, step(case, size, path, device, expected.batch))


def compiled(case: Case, size: Size, device: str, backend: str) -> dict[str, Any]:
    """Compare a step of a compiled network with that of the network, on one device."""
    with tempfile.TemporaryDirectory() as folder, without_tf32():
        path = start(case, size, Path(folder))
        expected = step(case, size, path, device)
        return compared(expected, step(case, size, path, device, expected.batch, compile_network=backend))


def one_process(case: Case, size: Size, device: str, backend: str) -> dict[str, Any]:
    """Compare a step under DDP with one process with a step without DDP, on one device."""
    with tempfile.TemporaryDirectory() as folder, without_tf32():
        path = start(case, size, Path(folder))
        expected = step(case, size, path, device)
        try:
            found = step(case, size, path, device, expected.batch, DDPStrategy(process_group_backend=backend))
            used = torch.distributed.get_backend()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return {**compared(expected, found), "backend": used}


def compared(expected: Step, found: Step) -> dict[str, Any]:
    """Return the errors of a step, the tolerances, and whether the errors are within them."""
    errors = difference(expected, found)
    passed = errors["loss_error"] <= LOSS_TOLERANCE and errors["gradient_error"] <= GRADIENT_TOLERANCE
    return {**errors, "loss_tolerance": LOSS_TOLERANCE, "gradient_tolerance": GRADIENT_TOLERANCE, "passed": passed}


class without_tf32:  # noqa: N801  # a context manager, like torch.no_grad
    """Context manager for products and convolutions in full fp32."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


# Whole fits ------------------------------------------------------------------------------------------------------------


class NoSynchronization(L.Callback):
    """Raise an error where the CPU waits for the GPU, from the start of a training batch to its last optimizer step.

    Args:
        first_epoch: first epoch that is checked; earlier ones allocate memory and move constants.
    """

    def __init__(self, first_epoch: int = 2) -> None:
        self.first_epoch, self.steps = first_epoch, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to raise errors."""
        if trainer.current_epoch >= self.first_epoch:
            torch.cuda.set_sync_debug_mode("error")
            self.steps += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise no more errors."""
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Raise no more errors, because the trainer waits for the GPU when it ends."""
        torch.cuda.set_sync_debug_mode("default")


def no_synchronization(case: Case, size: Size) -> dict[str, Any]:
    """Train in bf16-mixed, and raise an error at the first synchronization of a training step."""
    watch = NoSynchronization()
    fit(case, size, "cuda", 3, precision="bf16-mixed", callbacks=[watch])
    return {"steps": watch.steps, "passed": watch.steps > 0}


def finite_in_bf16(case: Case, size: Size, device: str) -> dict[str, Any]:
    """Train three epochs in bf16-mixed, and check that loss, weights and state are finite."""
    module, run = fit(case, size, device, 3, precision="bf16-mixed")
    values = [part for part in module.state_dict().values() if isinstance(part, Tensor) and part.is_floating_point()]
    loss = float(run.callback_metrics["train/loss"])
    finite = all(bool(torch.isfinite(part).all()) for part in [*values, torch.tensor(loss)])
    return {"loss": loss, "passed": finite}


def fit(case: Case, size: Size, device: str, epochs: int, **options: Any) -> tuple[Any, L.Trainer]:
    """Train a method, and return module and trainer."""
    with tempfile.TemporaryDirectory() as folder:
        module, run = case.build(size, Path(folder)), trainer(device, epochs, **options)
        run.fit(module, data(size))
    return module, run


# Dropout ---------------------------------------------------------------------------------------------------------------


SAVED_STEP = 6
"""Step after which the checkpoint is saved: the second one of the second epoch."""


class Dropping(SmallCNN):
    """A network with dropout, which uses the global random stream of its device."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, 4 width, H / 4, W / 4)."""
        return nn.functional.dropout(super().forward_features(x), 0.5, self.training)


class Streams(L.Callback):
    """Record the global random stream of the device before each step, and save a checkpoint in the middle of an epoch."""

    def __init__(self, device: str, path: Path | None) -> None:
        self.device, self.path = device, path
        self.states: dict[int, bytes] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the state."""
        state = torch.cuda.get_rng_state() if self.device == "cuda" else torch.get_rng_state()
        self.states[trainer.global_step] = state.numpy().tobytes()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the checkpoint."""
        if self.path is not None and trainer.global_step == SAVED_STEP:
            trainer.save_checkpoint(self.path)


def dropout_resume(device: str) -> dict[str, Any]:
    """Compare the random streams of dropout in a run resumed in mid-epoch with those of the uninterrupted run."""
    runs: list[dict[int, bytes]] = []
    size = TINY._replace(samples=4 * TINY.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "middle.ckpt"
        for ckpt_path in (None, path):
            torch.manual_seed(len(runs))  # another state before the resume
            network = Dropping(size.num_classes, width=4)
            module = methods.CrossEntropy(size.num_classes, (16, 16), network, warmup_epochs=0)
            streams = Streams(device, None if ckpt_path else path)
            trainer(device, 2, callbacks=[streams]).fit(module, data(size), ckpt_path=ckpt_path)
            runs.append(streams.states)
    whole, resumed = runs
    same = resumed == {number: whole[number] for number in range(SAVED_STEP, len(whole))}
    return {
        "steps": len(whole),
        "resumed_steps": len(resumed),
        "passed": same and len(set(whole.values())) == len(whole),
    }


def main() -> None:
    """Run the checks of this part."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = parse(part=True)
    run_checks("correctness", list(checks(options)), options)


if __name__ == "__main__":
    main()
