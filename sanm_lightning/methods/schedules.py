"""Learning-rate schedules with the length of the training."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

__all__ = ["Cosine", "LinearAfter", "OneCycle", "same_rates", "takes_total_steps"]


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


def same_rates(schedule: LRScheduler, total_steps: int, done: int) -> bool:
    """Return whether a schedule has the learning rates of one of another length in the first steps.

    This holds for :class:`LinearAfter` before its decay; the rates of the other schedules depend on the length from the
    first step on.

    Args:
        schedule: a schedule of the length of the training.
        total_steps: the other length.
        done: number of first steps.
    """
    return isinstance(schedule, LinearAfter) and done <= min(schedule.start * total_steps, schedule.first_step)


def takes_total_steps(make: Callable[..., LRScheduler]) -> bool:
    """Return whether a scheduler factory has an unset argument ``total_steps``, to be set from the trainer."""
    if isinstance(make, partial) and make.keywords.get("total_steps") not in (None, 1):
        return False
    target: Any = make
    while isinstance(target, partial):  # of the class, or of a factory whose first argument is the class
        classes = [argument for argument in target.args if inspect.isclass(argument)]
        target = classes[0] if classes else target.func
    try:
        return "total_steps" in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
