"""One optimizer for all trainable parameters, its schedule, and gradient clipping per network."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from sanm_lightning.methods.checks import require_unscaled
from sanm_lightning.methods.hooks import MethodHooks
from sanm_lightning.methods.schedules import same_rates, scheduler_config

__all__ = ["Optimization", "sgd"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the default optimizer: SGD, learning rate .02, momentum .9, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


class Optimization(MethodHooks):
    """Mixin with optimizer, schedule and gradient clipping of a method."""

    optimizer: OptimizerCallable
    scheduler: LRSchedulerCallable | None
    lr: float | None = None
    """Learning rate that overrides that of the optimizer; set by Lightning's ``LearningRateFinder``."""
    finders_pending = False
    """Whether Lightning's finders will run before the first step; set by :class:`~sanm_lightning.callbacks.Finders`."""
    schedule_steps: int | None = None
    """Length, in steps, of a learning-rate schedule that receives it from the trainer."""
    resumed_schedule: tuple[int, int] | None = None
    """Length of the schedule of the checkpoint from which training is resumed, and number of its steps so far."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each network and its decoder separately; a stage may override the value.

        Raises:
            ValueError: if the gradients of several networks are scaled, with a fused optimizer in precision 16-mixed; that of
                one network is an error of Lightning.
        """
        if self.stage.gradient_clip_val is not None:
            gradient_clip_val, gradient_clip_algorithm = self.stage.gradient_clip_val, "norm"
        if not gradient_clip_val:
            return
        if len(self.networks) == 1:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        require_unscaled(optimizer, self.trainer, "they are clipped")
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for parts in zip(self.networks, self.sanms, strict=True):
            clip([parameter for part in parts for parameter in part.parameters()], gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create one optimizer for all trainable parameters, and its schedule.

        Raises:
            ValueError: if training is resumed with another length of the schedule, unless the learning rates of all steps
                so far are the same for both lengths.
        """
        optimizer = self._create_optimizer()
        if self.scheduler is None:
            return optimizer
        config, self.schedule_steps = scheduler_config(self.scheduler, optimizer, self.trainer)
        self._require_same_length(config["scheduler"])
        if self.finders_pending:  # the trials of a finder would step the schedule
            return self._create_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def _create_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        return optimizer

    def _require_same_length(self, schedule: Any) -> None:
        """Raise ValueError if training is resumed with another length of a schedule, unless the rates so far are the same."""
        resumed, self.resumed_schedule = self.resumed_schedule, None
        if resumed is None or self.schedule_steps in (None, resumed[0]):
            return
        planned, done = resumed
        if not same_rates(schedule, planned, done):
            raise ValueError(
                f"expected a training of {planned} steps, the length of the checkpoint's learning-rate schedule, got "
                f"{self.schedule_steps}; use the original max_epochs, max_steps, batches and processes, or start a new run "
                "from the weights of the checkpoint with --weights FILE instead of --ckpt_path"
            )
