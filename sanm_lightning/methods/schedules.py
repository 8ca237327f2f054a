"""Learning-rate schedules that learn their length from the trainer."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

__all__ = ["Cosine", "LinearAfter", "OneCycle", "takes_total_steps"]


class OneCycle(OneCycleLR):
    """One cycle over the whole training: torch's ``OneCycleLR``, stepped per batch, of the trainer's length.

    Source: Smith and Topin, 2019.

    Args:
        optimizer: whose learning rate to set.
        max_lr: the peak.
        total_steps: optimizer steps of the training; the methods of this package fill it in.
        pct_start: fraction of the steps before the peak.
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


class LinearAfter(LambdaLR):
    """Constant at first, then linear to 0 at the end of the training; stepped per batch, of the trainer's length.

    Source: the code of Co-teaching, which steps it per epoch and also turns Adam's first momentum down when the decay starts.

    Args:
        optimizer: whose learning rate to set.
        total_steps: optimizer steps of the training; the methods of this package fill it in.
        start: fraction of the steps before the decay, in [0, 1).
        late_beta1: Adam's first momentum from the decay on; None leaves it.

    Raises:
        ValueError: if ``start`` is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int = 1, start: float = 0.4, late_beta1: float | None = None
    ) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"expected start in [0, 1), got {start}")
        first = start * total_steps
        self.first_step, self.late_beta1 = first, late_beta1
        super().__init__(optimizer, lambda step: min(1.0, max(0.0, (total_steps - step) / (total_steps - first))))

    def step(self, epoch: int | None = None) -> None:
        """Set the rate, and from the decay on Adam's first momentum."""
        super().step(epoch)
        if self.late_beta1 is not None and self.last_epoch >= self.first_step:
            for group in self.optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (self.late_beta1, *group["betas"][1:])


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
