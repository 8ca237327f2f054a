"""Run the start-of-epoch logic exactly once per epoch, also in resumed runs."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.callbacks.broadcast import share_buffers, share_state
from sanm_lightning.callbacks.stages import Stages, locate
from sanm_lightning.random_streams import named_seed, process_rank, several_processes

__all__ = ["EpochStart"]


class EpochStart(L.Callback):
    """Start stages, fit label quality and call ``begin_epoch`` of the method before the first batch of an epoch.

    The loader of a data module of this package calls :meth:`prepare`; with other loaders, it is called before the first
    training step. The number of the started epoch is saved in checkpoints, because Lightning does not call
    ``on_train_epoch_start`` in a run resumed from the last step of an epoch.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.begun = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check that a method that requires a data module of this package has one.

        Raises:
            ValueError: if there is none.
        """
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and pl_module.needs_data_module and not hasattr(data, "pass_dataloader"):
            raise ValueError(
                f"expected a data module of this package for {type(pl_module).__name__}, which selects its samples or "
                f"views, got {type(data).__name__}; use CIFAR10, ImageFolder, ... or a subclass of NoisyDataModule"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the training set before the first step.

        Raises:
            ValueError: if a label is outside [0, C), or the method does not support the training set.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if pl_module.needs_data_module:
            pl_module.check_training_set(int(data.num_samples), int(data.batch_size), trainer.world_size)
        labels = getattr(data, "labels", None)
        if isinstance(labels, Tensor) and len(labels) and int(labels.max()) >= pl_module.num_classes:
            raise ValueError(
                f"expected labels in [0, {pl_module.num_classes}), got {int(labels.max())}; check num_classes and the "
                "data"
            )

    def prepare(self, trainer: Any, pl_module: Any) -> None:
        """Start the current epoch, unless it is started. A collective operation: every process must call it."""
        if self.begun == trainer.current_epoch:
            return
        share_buffers(pl_module)
        if several_processes():  # otherwise, all ranks use the same dropout masks
            torch.manual_seed(named_seed("dropout", pl_module.sanm.seed, process_rank(), trainer.current_epoch))
        number, _, first = locate(pl_module.stages(), trainer.current_epoch)
        if number > 0 and trainer.current_epoch == first:
            pl_module.begin_stage()  # before the network is reset
        self.stages.begin(trainer, pl_module)
        for callback in trainer.callbacks:
            if callable(begin := getattr(callback, "begin_epoch", None)):
                begin(trainer, pl_module)
        pl_module.begin_epoch()
        share_state(pl_module)
        self.begun = trainer.current_epoch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the epoch, unless the loader has started it."""
        self.prepare(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Synchronize buffers, so that all processes have the same network."""
        share_buffers(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Synchronize buffers in a run resumed after its last step."""
        share_buffers(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number of the started epoch."""
        checkpoint.setdefault("method", {})["begun"] = self.begun

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the number of the started epoch."""
        self.begun = checkpoint.get("method", {}).get("begun", -1)
