"""An averaged copy of a network: a teacher that follows the network in training."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA(nn.Module):
    """Exponential moving average of the parameters of a network; buffers are the copy's own.

    In place of ``torch.optim.swa_utils.AveragedModel``, which copies the network at the first update, leaves gradients on, and
    reads its counter back from the device in every update.

    Args:
        network: the first values. It is copied.
        decay: fraction of the old average that stays at update number 0, 1, ..., in [0, 1].
    """

    def __init__(self, network: nn.Module, decay: Callable[[int], float]) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self.steps = 0
        self._copy_next = False

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards ``network``, after its optimizer step."""
        weight = 1.0 if self._copy_next else 1 - self.decay(self.steps)
        self._copy_next = False
        for slow, fast in zip(self.module.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast.to(slow.dtype), weight)
        self.steps += 1

    def restart(self) -> None:
        """Begin again: the next update copies the network, and counts as the first one."""
        self.steps = 0
        self._copy_next = True

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C), without gradient."""
        with torch.no_grad():
            logits: Tensor = self.module(images)
        return logits

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of updates, and whether the next one copies."""
        return {"steps": self.steps, "copy_next": self._copy_next}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.steps, self._copy_next = int(state["steps"]), bool(state["copy_next"])
