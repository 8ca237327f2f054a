"""Run code before and after each optimizer step."""

from collections.abc import Callable
from typing import Any

import lightning as L
from torch.optim import Optimizer

__all__ = ["OptimizerSteps", "register_step_hooks"]


def register_step_hooks(
    optimizer: Optimizer, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> list[Any]:
    """Register functions that run once before and once after each step of an optimizer.

    Hooks of torch run twice per step if ``step`` of a subclass calls that of its base class.

    Args:
        optimizer: optimizer of torch.
        before: function to run before a step; None for none.
        after: function to run after a step; None for none.

    Returns:
        Handles, whose ``remove()`` removes the hooks.

    Raises:
        ValueError: if the optimizer does not call hooks, as ``timm.optim.Lookahead``, which does not call
            ``Optimizer.__init__``.
    """
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"expected an optimizer that calls the hooks of its steps, got {type(optimizer).__name__}, which does not call "
            "Optimizer.__init__; use another optimizer"
        )
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        if depth == 0 and before is not None:
            before()
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0 and after is not None:
            after()

    return [optimizer.register_step_pre_hook(enter), optimizer.register_step_post_hook(leave)]


class OptimizerSteps(L.Callback):
    """Call ``after_optimizer_step`` of the method after each optimizer step, before another callback can save a checkpoint.

    It is registered with the optimizer, so a subclass may override ``optimizer_step``, ``configure_optimizers`` and
    ``on_train_batch_end``. It is not called for a step that gradient scaling skips, except with optimizers that skip it
    themselves (``fused``).
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Register the optimizer hooks.

        Raises:
            ValueError: if an optimizer does not call hooks.
        """
        for optimizer in trainer.optimizers:
            self._handles += register_step_hooks(optimizer, after=lambda: pl_module.after_optimizer_step())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the optimizer hooks."""
        while self._handles:
            self._handles.pop().remove()
