"""The checkpoints of a run of the command line: the last and the best epoch."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

__all__ = ["RunCheckpoint"]

MONITORED = ("val/acc", "test/acc")
"""Metrics that select the best epoch, by preference; higher is better."""


class RunCheckpoint(ModelCheckpoint):
    """Write ``last.ckpt`` after every epoch, and ``best.ckpt`` when the accuracy is higher than in all earlier epochs.

    The accuracy is that on the split ``val``, whose labels may be wrong, or on the test set if there is no such split.
    Without both, only ``last.ckpt`` is written. A resumed run overwrites its two files. Files of another run in the same
    directory are kept; the new ones are then named ``last-v1.ckpt`` and ``best-v1.ckpt``.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True)
        self.best_path = ""
        """Path of the checkpoint of the best epoch; empty if there is none."""
        self.best_accuracy = -1.0
        """Accuracy of the best epoch, in [0, 1]; -1 if there is none."""
        self.best_metric: str | None = None
        """Name of the metric that selected the best epoch; None if there is none."""
        self._evaluated_at = -1  # number of steps before the last evaluation

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: that of Lightning's default callback, so that each resumes runs of the other."""
        return ModelCheckpoint().state_key

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the current weights are evaluated."""
        if not trainer.sanity_checking:
            self._evaluated_at = trainer.global_step

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Write the checkpoints of this epoch. A collective operation."""
        if self._evaluated_at == trainer.global_step and not trainer.fast_dev_run:
            self._save_if_best(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def _save_if_best(self, trainer: L.Trainer) -> None:
        name = next((name for name in MONITORED if name in trainer.callback_metrics), None)
        # a foreign module may log a different value in each process
        accuracy: float = trainer.strategy.broadcast(-1.0 if name is None else float(trainer.callback_metrics[name]))
        if not accuracy > self.best_accuracy:
            return
        self.best_accuracy, self.best_metric = accuracy, name
        version = self.STARTING_VERSION
        path = self.best_path or self.format_checkpoint_name({}, "best")
        while path != self.best_path and self.file_exists(path, trainer):
            path = self.format_checkpoint_name({}, "best", ver=version)
            version += 1
        self.best_path = path  # before saving, since it is part of the state
        trainer.save_checkpoint(path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the paths, the best accuracy and its metric."""
        best = {"best_path": self.best_path, "best_accuracy": self.best_accuracy, "best_metric": self.best_metric}
        return {**super().state_dict(), **best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the paths and the best accuracy; those of a run in another directory are not used."""
        if state_dict.get("dirpath") == self.dirpath:
            super().load_state_dict(state_dict)
            self.best_path = state_dict.get("best_path", "")
            self.best_accuracy = state_dict.get("best_accuracy", -1.0)
            self.best_metric = state_dict.get("best_metric")
