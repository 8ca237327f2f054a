"""Do the work of an epoch's beginning exactly once, also in a run that is resumed."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.callbacks.stages import Stages
from sanm_lightning.random_streams import named_seed, process_rank, several_processes

__all__ = ["EpochStart"]


class EpochStart(L.Callback):
    """Begin stages, fit label quality and call the method's ``begin_epoch`` before the first batch of an epoch is fetched.

    The data module's loader calls :meth:`prepare`; with any other loader it is called before the first training step. The
    number of the epoch that has begun is saved: Lightning's ``on_train_epoch_start`` is skipped in a run that is resumed from
    the last step of an epoch, and called again in no other, so that it cannot be relied on.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.begun = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a loader where the method needs a data module of this package.

        Raises:
            ValueError: if there is none.
        """
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and pl_module.needs_data_module and not hasattr(data, "pass_dataloader"):
            raise ValueError(
                f"expected a data module of this package for {type(pl_module).__name__}, which chooses its samples or views, "
                f"got {type(data).__name__}; use CIFAR10, ImageFolder, ... or a subclass of NoisyDataModule"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse data that the method cannot learn from, before the first step.

        Raises:
            ValueError: if a label is outside [0, C), or the method itself refuses the training set.
        """
        data: Any = getattr(trainer, "datamodule", None)
        if pl_module.needs_data_module:
            pl_module.check_training_set(int(data.num_samples), int(data.batch_size), trainer.world_size)
        labels = getattr(data, "labels", None)
        if isinstance(labels, Tensor) and len(labels) and int(labels.max()) >= pl_module.num_classes:
            raise ValueError(
                f"expected labels in [0, {pl_module.num_classes}), got {int(labels.max())}; check num_classes and the data"
            )

    def prepare(self, trainer: Any, pl_module: Any) -> None:
        """Begin the present epoch, unless it has begun. A collective: every process must call it."""
        if self.begun == trainer.current_epoch:
            return
        share_buffers(pl_module)
        if several_processes():  # seeded alike, they would drop out the same places of different images
            torch.manual_seed(named_seed("dropout", pl_module.sanm.seed, process_rank(), trainer.current_epoch))
        self.stages.begin(trainer, pl_module)
        for callback in trainer.callbacks:
            if callable(begin := getattr(callback, "begin_epoch", None)):
                begin(trainer, pl_module)
        pl_module.begin_epoch()
        self.begun = trainer.current_epoch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the epoch, where the loader has not."""
        self.prepare(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave all processes with the same network."""
        share_buffers(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do the same in a run that is resumed after its last step."""
        share_buffers(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the epoch that has begun."""
        checkpoint.setdefault("method", {})["begun"] = self.begun

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the epoch that has begun."""
        self.begun = checkpoint.get("method", {}).get("begun", -1)


def share_buffers(module: torch.nn.Module) -> None:
    """Give all processes the batch statistics of rank 0, which are those of a checkpoint. A collective.

    DistributedDataParallel does so before each forward, and not after the last one: passes outside of it would see as many
    networks as there are processes, and a resumed run would score with others than the run that went on.
    """
    if not several_processes():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():  # one message for all of a kind
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        torch.distributed.broadcast(flat, 0)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
