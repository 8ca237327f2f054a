"""Learning-rate schedules with the length of the training."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

__all__ = [
    "Chained",
    "Cosine",
    "LinearAfter",
    "OneCycle",
    "Sequential",
    "same_rates",
    "scheduler_config",
    "takes_total_steps",
]


class OneCycle(OneCycleLR):
    """One cycle over the whole training: torch's ``OneCycleLR``, stepped per batch.

    Source: Smith and Topin, 2019.

    Args:
        optimizer: wrapped optimizer.
        max_lr: peak learning rate.
        total_steps: optimizer steps of the training; set by the methods of this package.
        pct_start: fraction of the steps before the peak.
        div_factor: ratio of peak to initial learning rate.
        final_div_factor: ratio of initial to final learning rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float,
        total_steps: int = 1,
        pct_start: float = 0.3,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__(
            optimizer,
            max_lr,
            total_steps=total_steps,
            pct_start=pct_start,
            div_factor=div_factor,
            final_div_factor=final_div_factor,
        )


class Cosine(CosineAnnealingLR):
    """Cosine annealing over the whole training, stepped per batch.

    Args:
        optimizer: wrapped optimizer.
        total_steps: optimizer steps of the training; set by the methods of this package.
        eta_min: final learning rate.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int = 1, eta_min: float = 0.0) -> None:
        super().__init__(optimizer, T_max=total_steps, eta_min=eta_min)


class LinearAfter(LambdaLR):
    """Constant learning rate, then linear decay to 0 at the end of the training, stepped per batch.

    Source: the code of Co-teaching, which steps it per epoch and also reduces Adam's beta1 when the decay starts.

    Args:
        optimizer: wrapped optimizer.
        total_steps: optimizer steps of the training; set by the methods of this package.
        start: fraction of the steps before the decay, in [0, 1).
        late_beta1: Adam's beta1 during the decay; None keeps it unchanged.

    Raises:
        ValueError: if ``start`` is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int = 1, start: float = 0.4, late_beta1: float | None = None
    ) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"expected start in [0, 1), got {start}")
        first = start * total_steps
        self.start, self.first_step, self.late_beta1 = start, first, late_beta1
        super().__init__(optimizer, lambda step: min(1.0, max(0.0, (total_steps - step) / (total_steps - first))))

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rate, and Adam's beta1 during the decay."""
        super().step(epoch)
        if self.late_beta1 is not None and self.last_epoch >= self.first_step:
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (self.late_beta1, *group["betas"][1:])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in the schedule; its length is that of this training."""
        super().load_state_dict({**state_dict, "start": self.start, "first_step": self.first_step})


def same_rates(schedule: Any, total_steps: int, done: int) -> bool:
    """Return whether a schedule has the learning rates of one of another length in the first steps.

    This holds for :class:`LinearAfter` before its decay; the rates of the other schedules depend on the length from the
    first step on.

    Args:
        schedule: a schedule of the length of the training.
        total_steps: the other length.
        done: number of first steps.
    """
    return isinstance(schedule, LinearAfter) and done <= min(schedule.start * total_steps, schedule.first_step)


class Sequential(SequentialLR):
    """Several schedules one after the other, stepped per epoch: torch's ``SequentialLR``, for the command line.

    Args:
        optimizer: wrapped optimizer.
        schedulers: functions that create the schedules.
        milestones: first epoch of each schedule but the first one.

    Raises:
        ValueError: if a schedule is not stepped per epoch.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable], milestones: list[int]) -> None:
        super().__init__(optimizer, _per_epoch(optimizer, schedulers, "Sequential"), milestones)


class Chained(ChainedScheduler):
    """Product of several schedules, stepped per epoch: torch's ``ChainedScheduler``, for the command line.

    Args:
        optimizer: wrapped optimizer.
        schedulers: functions that create the schedules.

    Raises:
        ValueError: if a schedule is not stepped per epoch.
    """

    def __init__(self, optimizer: Optimizer, schedulers: list[LRSchedulerCallable]) -> None:
        super().__init__(_per_epoch(optimizer, schedulers, "Chained"), optimizer)


PER_BATCH = (OneCycleLR, CyclicLR, Cosine, LinearAfter)
"""Schedules that are stepped per batch, also if their length is given."""


def scheduler_config(
    make: LRSchedulerCallable, optimizer: Optimizer, trainer: Any
) -> tuple[dict[str, Any], int | None]:
    """Create a schedule.

    Args:
        make: function that creates it from the optimizer, and ``total_steps`` if it has this argument.
        optimizer: optimizer of the method.
        trainer: trainer with the length of the training.

    Returns:
        Configuration for ``configure_optimizers``: scheduler, interval and monitor; and the number of steps that the
        schedule has received from the trainer, or None.

    Raises:
        ValueError: if the schedule cannot be created, is shorter than the training, or has learning rates of its own
            while ``LearningRateFinder`` is used.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = training_steps(trainer) if takes_total_steps(make) else None
    try:
        schedule: Any = make(optimizer) if steps is None else make(optimizer, total_steps=steps)  # type: ignore[call-arg]
    except NotImplementedError as error:
        raise ValueError(
            "expected a scheduler class that computes learning rates, got an abstract class; use LambdaLR, for example"
        ) from error
    name = type(schedule).__name__
    initial = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if initial != rates and any(isinstance(part, LearningRateFinder) for part in trainer.callbacks):
        raise ValueError(
            f"expected a schedule that starts from the optimizer's learning rate for LearningRateFinder, got {name}, "
            "which has rates of its own; use another scheduler, such as Cosine, or remove the callback"
        )
    if isinstance(schedule, ReduceLROnPlateau):
        return {"scheduler": schedule, "monitor": getattr(schedule, "monitor", None) or "train/loss"}, None
    if steps is None and isinstance(schedule, OneCycleLR) and schedule.total_steps < training_steps(trainer):
        raise ValueError(
            f"expected total_steps of {training_steps(trainer)} or more, the steps of the training, for {name}, got "
            f"{schedule.total_steps}; omit total_steps"
        )
    per_batch = steps is not None or isinstance(schedule, PER_BATCH)
    return {"scheduler": schedule, "interval": "step" if per_batch else "epoch"}, steps


def training_steps(trainer: Any) -> int:
    """Return the number of optimizer steps of a training.

    Raises:
        ValueError: if the training has no end.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 <= steps < math.inf:
        raise ValueError(
            f"expected max_epochs or max_steps for a schedule over the whole training, got max_epochs {trainer.max_epochs} "
            "without max_steps; set one of them, or use a schedule without total_steps"
        )
    accumulation = [part for part in trainer.callbacks if isinstance(part, GradientAccumulationScheduler)]
    if accumulation and trainer.max_epochs > 0:
        factors = [accumulation[0].get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
        steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
        steps = steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
    return max(1, int(steps))


def takes_total_steps(make: Callable[..., Any]) -> bool:
    """Return whether a scheduler factory has an unset argument ``total_steps``, to be set from the trainer."""
    if isinstance(make, partial) and (
        make.keywords.get("total_steps") not in (None, 1) or make.keywords.get("epochs") is not None
    ):
        return False
    target: Any = make
    while isinstance(target, partial):  # of the class, or of a factory whose first argument is the class
        classes = [argument for argument in target.args if inspect.isclass(argument)]
        target = classes[0] if classes else target.func
    try:
        return "total_steps" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


def _per_epoch(optimizer: Optimizer, makers: list[LRSchedulerCallable], owner: str) -> list[Any]:
    """Return the schedules, after a check that they are stepped per epoch."""
    schedules = []
    for make in makers:
        schedule = None if takes_total_steps(make) else make(optimizer)
        if schedule is None or isinstance(schedule, (*PER_BATCH, ReduceLROnPlateau)):
            raise ValueError(
                f"expected schedulers in {owner} that are stepped per epoch and need no metric, got another one; use "
                "LinearLR, CosineAnnealingLR or ExponentialLR, for example"
            )
        schedules.append(schedule)
    return schedules
