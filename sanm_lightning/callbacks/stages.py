"""Stages of a training: warm-up and what follows it, each with its own length, learning rate and fresh or frozen parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sanm_lightning.random_streams import named_seed

__all__ = ["Stage", "Stages", "locate", "reset_parameters", "stage_epochs"]


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    The stage of an epoch is a function of the epoch alone, so that there is nothing to save.

    Args:
        name: such as ``"warmup"``.
        epochs: length; None lasts to the end of the training. A stage of length 0 is left out.
        reset: what is drawn anew when the stage begins: ``"none"``, the ``"head"`` (classifier) or the whole ``"network"`` of
            every network, with its decoder and averaged copies. The optimizer forgets its state for them.
        lr: learning rate in place of the optimizer's and its schedule; None leaves it to them.
        weight_decay: in place of the optimizer's.
        factor: of ``lr`` (or the optimizer's rate), a function of the stage's own step and its number of steps.
        gradient_clip_val: norm that the gradients of each network are clipped to, in place of the trainer's setting.
        frozen: names of submodules whose parameters the optimizer leaves as they are. Their gradients are still computed, so
            that ``ddp`` finds every parameter used.
    """

    name: str
    epochs: int | None = None
    reset: Literal["none", "head", "network"] = "none"
    lr: float | None = None
    weight_decay: float | None = None
    factor: Callable[[int, int], float] | None = None
    gradient_clip_val: float | None = None
    frozen: tuple[str, ...] = ()


def locate(stages: Iterable[Stage], epoch: int) -> tuple[int, Stage, int]:
    """Return number and stage of an epoch, and the epoch in which that stage begins."""
    first, last = 0, None
    for number, stage in enumerate(stages):
        if stage.epochs is None or epoch < first + stage.epochs:
            return number, stage, first
        last = number, stage, first
        first += stage.epochs
    assert last is not None
    return last


def stage_epochs(stages: Iterable[Stage], epochs: int) -> dict[str, int]:
    """Return how many of the first ``epochs`` epochs of a run belong to each stage; 0 where a stage did not begin."""
    found, left = {}, epochs
    for stage in stages:
        length = left if stage.epochs is None else min(stage.epochs, left)
        found[stage.name] = length
        left -= length
    if left > 0 and found:  # beyond the last one, which goes on
        found[stage.name] += left
    return found


def reset_parameters(module: nn.Module) -> None:
    """Draw the parameters of a module anew, where it can; for ``Module.apply``."""
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()


class Stages(L.Callback):
    """Apply the stages of a method: :meth:`begin` at the start of an epoch, learning rates and frozen parts in every step.

    A stage's learning rate and weight decay are those of the optimizer during its step only: a schedule that computes the
    next rate from the last one never sees them.

    Raises:
        ValueError: if nothing after the first stage can begin within ``max_epochs``.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._before: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that the stages fit into the training, and attach to the optimizers."""
        stages = [stage for stage in pl_module.stages() if stage.epochs != 0]
        epochs = trainer.max_epochs
        if epochs is not None and epochs > 0 and not getattr(trainer, "fast_dev_run", False):
            late = [stage.name for stage in stages if stage_epochs(stages, epochs)[stage.name] == 0]
            if late and len(late) == len(stages) - 1:
                raise ValueError(
                    f"expected max_epochs above the {stages[0].epochs} epochs of the stage {stages[0].name!r}, got {epochs}; "
                    f"raise max_epochs, or lower {'warmup_epochs' if stages[0].name == 'warmup' else 'the length of the stage'}"
                )
            for name in late:
                rank_zero_warn(
                    f"{type(pl_module).__name__}: the stage {name!r} does not begin within max_epochs {epochs}; "
                    "results.json lists it with 0 epochs"
                )
        if any((stage.lr, stage.weight_decay, stage.factor) != (None, None, None) for stage in stages):
            for optimizer in trainer.optimizers:
                self._handles.append(
                    optimizer.register_step_pre_hook(lambda optimizer, *_: self._enter(optimizer, trainer, pl_module))
                )
                self._handles.append(optimizer.register_step_post_hook(lambda optimizer, *_: self._leave(optimizer)))

    def begin(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw anew what the stage of this epoch asks for, if it begins with the epoch. The same in every process."""
        number, stage, first = locate(pl_module.stages(), trainer.current_epoch)
        if trainer.current_epoch != first or number == 0 or stage.reset == "none":
            return
        drawn: set[nn.Parameter] = set()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(named_seed("reset", pl_module.sanm.seed, number))
            drawn.update(pl_module.reset(head_only=stage.reset == "head"))
        for optimizer in trainer.optimizers:
            for parameter in drawn & optimizer.state.keys():
                del optimizer.state[parameter]

    def _enter(self, optimizer: torch.optim.Optimizer, trainer: L.Trainer, pl_module: Any) -> None:
        _, stage, first = locate(pl_module.stages(), trainer.current_epoch)
        self._before = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
        per_epoch = max(1, -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches))
        steps = per_epoch * int(stage.epochs or max(1, (trainer.max_epochs or 1) - first))
        factor = stage.factor(trainer.global_step - first * per_epoch, steps) if stage.factor else 1.0
        for group in optimizer.param_groups:
            group["lr"] = (group["lr"] if stage.lr is None else stage.lr) * factor
            if stage.weight_decay is not None:
                group["weight_decay"] = stage.weight_decay

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of what is frozen: the optimizer neither moves nor decays a parameter without gradient."""
        for name in pl_module.stage.frozen:
            for parameter in pl_module.get_submodule(name).parameters():
                parameter.grad = None

    def _leave(self, optimizer: torch.optim.Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self._before, strict=True):
            group.update(before)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Detach from the optimizers."""
        while self._handles:
            self._handles.pop().remove()
