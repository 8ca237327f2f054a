"""Means over the steps of an epoch, logged once per epoch."""

from typing import Any

import lightning as L
from torch import Tensor

from sanm_lightning.compat import validates_next

__all__ = ["EpochMeans"]


class EpochMeans:
    """Weighted means over the steps of an epoch, with the values of ``self.log(..., on_step=False, on_epoch=True)``.

    Values are summed on their device and logged at the last step of an epoch, because a call of ``LightningModule.log`` takes
    about 0.3 ms of host time per value (measured on a CPU).
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}  # name: weighted sum, sum of the weights

    def reset(self) -> None:
        """Delete all values."""
        self._sums = {}

    def update(self, name: str, value: Tensor, weight: int = 1) -> None:
        """Add the value of a step.

        Args:
            name: name in the logs.
            value: scalar.
            weight: weight in the mean, such as the number of images of the step.
        """
        total, weights = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + value.detach().float() * weight, weights + weight

    def log(self, pl_module: L.LightningModule, **options: Any) -> None:
        """Log the means, and delete the values.

        Args:
            pl_module: module of the running trainer.
            options: further arguments of ``pl_module.log``.
        """
        for name, (total, weights) in self._sums.items():
            mean = total / weights
            pl_module.log(name, mean, on_step=False, on_epoch=True, batch_size=weights, sync_dist=True, **options)
        self.reset()

    def log_if_last(self, trainer: L.Trainer, pl_module: L.LightningModule, **options: Any) -> None:
        """Log the means if the step can be the last one of an epoch or of the run; to be called at the end of every step.

        A step before a validation can be the last one, because callbacks stop a run there; Lightning adds the means of an
        epoch by their weights. Callbacks read the means in ``on_train_epoch_end`` in any order. If a run ends in a step that
        could not be recognized as its last one, call :meth:`log` in ``on_train_epoch_end``.
        """
        ends = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if ends or validates_next(trainer):
            self.log(pl_module, **options)
