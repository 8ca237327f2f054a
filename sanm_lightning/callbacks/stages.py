"""Training stages, such as warm-up, with separate length, learning rate, and reset or frozen parameters."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sanm_lightning.callbacks.optimizer_steps import register_step_hooks
from sanm_lightning.compat import batch_number, epochs_of_steps
from sanm_lightning.random_streams import named_seed

__all__ = ["Stage", "Stages", "locate", "repeated_stages", "reset_parameters", "stage_epochs"]


@dataclass(frozen=True)
class Stage:
    """Training stage.

    The stage of an epoch is a function of the epoch only, so checkpoints contain no stage.

    Args:
        name: name of the stage, such as ``"warmup"``.
        epochs: length in epochs; None lasts until the end of training. Stages of length 0 are skipped.
        reset: parameters that are reinitialized at the start of the stage: ``"none"``, the ``"head"`` (classifier) or
            the whole ``"network"`` of every network, with its decoder and averaged copies. Their optimizer state is
            deleted.
        lr: learning rate that overrides that of the optimizer and its schedule; None keeps theirs.
        weight_decay: weight decay that overrides that of the optimizer; None keeps it.
        factor: factor of ``lr`` (or the optimizer's rate), a function of the step within the stage and the number of
            steps of the stage, both for the current number of steps per epoch, so that their ratio is the elapsed fraction
            of the stage's epochs.
        ramp: a further factor, a function of the number of optimizer steps since the start of the training.
        gradient_clip_val: norm for gradient clipping of each network, which overrides the trainer's setting.
        frozen: names of submodules whose parameters are not updated. Their gradients are still computed, so ``ddp``
            finds no unused parameters.
        trained: parameters that are updated: ``"all"``, or those of the ``"head"`` (classifier) of every network only.
    """

    name: str
    epochs: int | None = None
    reset: Literal["none", "head", "network"] = "none"
    lr: float | None = None
    weight_decay: float | None = None
    factor: Callable[[int, int], float] | None = None
    ramp: Callable[[int], float] | None = None
    gradient_clip_val: float | None = None
    frozen: tuple[str, ...] = ()
    trained: Literal["all", "head"] = "all"


def locate(stages: Iterable[Stage], epoch: int) -> tuple[int, Stage, int]:
    """Return number and stage of an epoch, and the first epoch of that stage."""
    first, last = 0, None
    for number, stage in enumerate(stages):
        if stage.epochs is None or epoch < first + stage.epochs:
            return number, stage, first
        last = number, stage, first
        first += stage.epochs
    assert last is not None
    return last


def repeated_stages(stages: Sequence[Stage], runs: int) -> list[Stage]:
    """Return the stages of several runs, each with new networks; the last stage lasts until the end of training.

    Args:
        stages: the stages of the first run. Those of run n > 1 have names that end in ``_n``.
        runs: number of runs, >= 1.
    """
    found = list(stages)
    for run in range(2, runs + 1):
        first, *others = (replace(stage, name=f"{stage.name}_{run}") for stage in stages)
        found += [replace(first, reset="network"), *others]
    return [*found[:-1], replace(found[-1], epochs=None)]


def stage_epochs(stages: Iterable[Stage], epochs: int) -> dict[str, int]:
    """Return the number of the first ``epochs`` epochs in each stage; 0 for stages that are not reached."""
    found, left = {}, epochs
    for stage in stages:
        length = left if stage.epochs is None else min(stage.epochs, left)
        found[stage.name] = length
        left -= length
    if left > 0 and found:  # epochs after the last stage count as that stage
        found[stage.name] += left
    return found


def reset_parameters(module: nn.Module) -> None:
    """Reinitialize the parameters of a module with a method for it; for ``Module.apply``.

    It is ``reset_parameters``, or ``_reset_parameters`` in torch's ``MultiheadAttention`` and ``Transformer``.
    """
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            reset()
            return


class Stages(L.Callback):
    """Apply the stages of a method: resets at the start of an epoch, learning rates and frozen parts in every step.

    Learning rate and weight decay of a stage are set during the optimizer step only, so that schedules that compute the
    next rate from the last one are unaffected.

    Raises:
        ValueError: if no stage after the warm-up is reached within ``max_epochs``.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._before: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the stages against ``max_epochs``, and register optimizer hooks.

        Raises:
            ValueError: if no stage after the warm-up is reached, a stage with a factor has no length, or the optimizer does
                not call hooks.
        """
        stages = [stage for stage in pl_module.stages() if stage.epochs != 0]
        epochs = trainer.max_epochs
        if epochs is not None and epochs > 0 and not getattr(trainer, "fast_dev_run", False):
            late = [stage.name for stage in stages if stage_epochs(stages, epochs)[stage.name] == 0]
            if late and len(late) == len(stages) - 1 and stages[0].name == "warmup":
                raise ValueError(
                    f"expected max_epochs above the {stages[0].epochs} epochs of the stage 'warmup', got {epochs}; raise "
                    "max_epochs, or lower warmup_epochs"
                )
            for name in late:
                rank_zero_warn(
                    f"expected max_epochs that reach the stage {name!r} of {type(pl_module).__name__}, got {epochs}; "
                    "results.json lists the stage with 0 epochs"
                )
        endless = trainer.max_epochs == trainer.max_steps == -1
        if endless and any(stage.factor and stage.epochs is None for stage in stages):
            raise ValueError(
                "expected max_epochs or max_steps for a stage with a factor and without a length, got neither; set one of "
                "them, or the epochs of the stage"
            )
        if any((stage.lr, stage.weight_decay, stage.factor, stage.ramp) != (None,) * 4 for stage in stages):
            for optimizer in trainer.optimizers:
                enter = partial(self._enter, optimizer, trainer, pl_module)
                self._handles += register_step_hooks(optimizer, enter, partial(self._leave, optimizer))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the stages from the current epoch on, against the network and the training set, and warn of too few steps.

        Raises:
            ValueError: if a stage resets a network that cannot be reinitialized, or has a factor and the training set has
                no length.
        """
        end = math.inf if trainer.max_epochs == -1 else int(trainer.max_epochs or 1)
        first, limit = 0.0, epochs_of_steps(trainer)
        for number, stage in enumerate(pl_module.stages()):
            ahead, begins = trainer.current_epoch <= first < end, first < end
            if begins and stage.epochs != 0 and first >= limit:
                rank_zero_warn(
                    f"expected max_steps that reach the stage {stage.name!r} of {type(pl_module).__name__}, got "
                    f"{trainer.max_steps}; results.json lists the stage with 0 epochs"
                )
            length = math.inf if stage.epochs is None else stage.epochs
            first += length
            if ahead and length and number > 0 and stage.reset != "none":
                pl_module.check_reset(head_only=stage.reset == "head")
            if stage.factor and begins and first > trainer.current_epoch and math.isinf(trainer.num_training_batches):
                raise ValueError(
                    f"expected a training set with a length for the stage {stage.name!r} of {type(pl_module).__name__}, whose "
                    "learning rate depends on the number of its steps, got one without; set limit_train_batches to the "
                    "number of batches of an epoch"
                )

    def begin(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Reinitialize the parameters configured by the stage, in its first epoch. The same in every process."""
        number, stage, first = locate(pl_module.stages(), trainer.current_epoch)
        if trainer.current_epoch != first or number == 0 or stage.reset == "none":
            return
        drawn: set[nn.Parameter] = set()
        on_gpu, seed = pl_module.device.type == "cuda", named_seed("reset", pl_module.sanm.seed, number)
        with torch.random.fork_rng([pl_module.device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed(seed)  # of the current device
            drawn.update(pl_module.reset(head_only=stage.reset == "head"))
        for optimizer in trainer.optimizers:
            for parameter in drawn & optimizer.state.keys():
                del optimizer.state[parameter]

    def _enter(self, optimizer: torch.optim.Optimizer, trainer: L.Trainer, pl_module: Any) -> None:
        stage = pl_module.stage
        self._before = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]
        factor = stage.factor(*_position(trainer, pl_module)) if stage.factor else 1.0
        factor *= stage.ramp(trainer.global_step) if stage.ramp else 1.0
        for group in optimizer.param_groups:
            group["lr"] = (group["lr"] if stage.lr is None else stage.lr) * factor
            if stage.weight_decay is not None:
                group["weight_decay"] = stage.weight_decay

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Set the gradients of frozen parameters to None, so that the optimizer neither updates nor decays them."""
        stage = pl_module.stage
        frozen = [parameter for name in stage.frozen for parameter in pl_module.get_submodule(name).parameters()]
        if stage.trained == "head":
            heads = {parameter for network in pl_module.networks for parameter in network.get_classifier().parameters()}
            frozen += [parameter for parameter in pl_module.parameters() if parameter not in heads]
        for parameter in frozen:
            parameter.grad = None

    def _leave(self, optimizer: torch.optim.Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self._before, strict=True):
            group.update(before)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the optimizer hooks."""
        while self._handles:
            self._handles.pop().remove()


def _position(trainer: L.Trainer, pl_module: Any) -> tuple[int, int]:
    """Return the current optimizer step within its stage, from 0, and the number of steps of the stage.

    Earlier epochs count with the number of steps of the current one: batch size, processes and accumulation may differ.
    """
    epoch = trainer.current_epoch
    _, stage, first = locate(pl_module.stages(), epoch)
    per_epoch = max(1, -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches))
    step = batch_number(trainer) // trainer.accumulate_grad_batches  # of the epoch
    epochs = int(trainer.max_epochs or 1)
    if trainer.max_epochs == -1:
        epochs = epoch - (trainer.global_step - step - trainer.max_steps) // per_epoch
    return (epoch - first) * per_epoch + step, per_epoch * int(stage.epochs or max(1, epochs - first))
