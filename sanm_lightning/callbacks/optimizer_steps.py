"""Run code of a method after each optimizer step."""

from typing import Any

import lightning as L

__all__ = ["OptimizerSteps"]


class OptimizerSteps(L.Callback):
    """Call ``after_optimizer_step`` of the method after each optimizer step, before another callback can save a checkpoint.

    It is registered with the optimizer, so a subclass may override ``optimizer_step``, ``configure_optimizers`` and
    ``on_train_batch_end``. A step that gradient scaling skips is none.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register the optimizer hook."""
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: pl_module.after_optimizer_step()))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the optimizer hook."""
        while self._handles:
            self._handles.pop().remove()
