"""Exponential moving average of a network, used as a teacher."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EMA", "ramped_decay", "stepped_decay"]


class EMA(nn.Module):
    """Exponential moving average of the parameters of a network; buffers are not averaged.

    It replaces ``torch.optim.swa_utils.AveragedModel``, which copies the network at the first update, keeps gradients
    enabled, and synchronizes its counter with the device in every update.

    Args:
        network: network with the initial values, which are copied.
        decay: weight of the old average in an update, in [0, 1], or a function of the update number, from 0, that returns it.
    """

    def __init__(self, network: nn.Module, decay: float | Callable[[int], float]) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0
        self._copy_next = False

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average with the parameters of ``network``; call it after the optimizer step."""
        decay = self.decay(self.steps) if callable(self.decay) else self.decay
        weight = 1.0 if self._copy_next else 1 - decay
        self._copy_next = False
        for slow, fast in zip(self.module.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast.to(slow.dtype), weight)
        self.steps += 1

    def restart(self) -> None:
        """Reset the average: the next update copies the network and has number 0."""
        self.steps = 0
        self._copy_next = True

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, C, H, W), without gradient."""
        with torch.no_grad():
            logits: Tensor = self.module(images)
        return logits

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of updates, and whether the next update copies the network."""
        return {"steps": self.steps, "copy_next": self._copy_next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.steps, self._copy_next = int(state["steps"]), bool(state["copy_next"])


def ramped_decay(decay: float, step: int) -> float:
    """Return the decay of an update that is limited at first: (1 + step) / (10 + step), at most ``decay``."""
    return min(decay, (1 + step) / (10 + step))


def stepped_decay(ramp_steps: int, step: int) -> float:
    """Return the decay of an update: 0.99 before ``ramp_steps`` updates, 0.999 afterwards."""
    return 0.99 if step < ramp_steps else 0.999
