"""Log the training loss, and stop the run if it is NaN or infinite."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.epoch_means import EpochMeans
from sanm_lightning.random_streams import several_processes

__all__ = ["FiniteLoss"]


class FiniteLoss(L.Callback):
    """Log ``train/loss``, and stop the run if a loss is NaN or infinite before a checkpoint is saved.

    The check runs on the device. Its result is read at the logging interval, at the end of an epoch and before a
    checkpoint, in all processes together.

    Raises:
        ValueError: if a loss was not finite; the message contains the first such step.
    """

    def __init__(self) -> None:
        self._means = EpochMeans()
        self._bad_step: Tensor | None = None  # step of the first loss that was not finite, or -1, on the device

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete the losses of an interrupted epoch."""
        self._means.reset()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Record whether the loss is finite."""
        if self._bad_step is None or self._bad_step.device != loss.device:
            self._bad_step = torch.full((), -1, device=loss.device)
        first = (self._bad_step < 0) & ~torch.isfinite(loss.detach())
        self._bad_step = self._bad_step.masked_fill(first, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of the step to the mean over the images of the epoch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # Lightning has divided it by the number of accumulated batches
            images = NoisyBatch.from_any(batch, need_labels=False).images
            self._means.update("train/loss", loss * trainer.accumulate_grad_batches, len(images))
        self._means.log_if_last(trainer, pl_module, prog_bar=True)
        interval = getattr(trainer, "log_every_n_steps", 0)
        if interval and (batch_idx + 1) % interval == 0:
            self._require_finite(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the losses of the epoch."""
        self._means.log(pl_module, prog_bar=True)
        self._require_finite(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the losses before a checkpoint is written."""
        self._require_finite(pl_module)

    def _require_finite(self, pl_module: L.LightningModule) -> None:
        never = torch.iinfo(torch.int64).max
        bad = torch.full((), -1) if self._bad_step is None else self._bad_step
        first = torch.where(bad < 0, never, bad).to(pl_module.device)
        if several_processes():  # otherwise, one process stops and the others deadlock
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        step = int(first)
        if step < never:
            raise ValueError(
                f"expected finite losses, got NaN or infinity from {type(pl_module).__name__}, first at step {step} "
                f"(epoch {pl_module.current_epoch} or before); lower the learning rate, clip gradients, or check the "
                "images"
            )
