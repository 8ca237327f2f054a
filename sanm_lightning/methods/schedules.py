"""Learning-rate schedules that learn their length from the trainer."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

__all__ = ["Cosine", "OneCycle", "takes_total_steps"]


class OneCycle(OneCycleLR):
    """One cycle over the whole training: torch's ``OneCycleLR``, stepped per batch, of the trainer's length.

    Source: Smith and Topin, 2019.

    Args:
        optimizer: whose learning rate to set.
        max_lr: the peak.
        total_steps: optimizer steps of the training; the methods of this package fill it in.
        pct_start: share of the steps before the peak.
        div_factor: peak over first learning rate.
        final_div_factor: first over last learning rate.
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
    """Half a cosine over the whole training, stepped per batch, of the trainer's length.

    Args:
        optimizer: whose learning rate to set.
        total_steps: optimizer steps of the training; the methods of this package fill it in.
        eta_min: the last learning rate.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int = 1, eta_min: float = 0.0) -> None:
        super().__init__(optimizer, T_max=total_steps, eta_min=eta_min)


def takes_total_steps(make: Callable[..., LRScheduler]) -> bool:
    """Say whether a scheduler factory leaves ``total_steps`` open, so that the trainer's length can be filled in."""
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
