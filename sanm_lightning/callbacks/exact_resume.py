"""Make resumed runs identical to uninterrupted runs."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sanm_lightning.class_names import named_classes, refuse_other_classes
from sanm_lightning.compat import restore_loader, resume_evaluation
from sanm_lightning.random_streams import process_rank, several_processes

__all__ = ["ExactResume", "require_same_method"]


class ExactResume(L.Callback):
    """Save and restore the global random streams of each process, and check that a checkpoint belongs to the run.

    Dropout uses the global stream of the device, which on an accelerator is not that of the CPU. All other random
    numbers come from streams named by epoch and step.

    Raises:
        ValueError: if training is resumed from a checkpoint with another method or number of classes.
    """

    def __init__(self) -> None:
        self._stream: Tensor | None = None  # of the CPU, restored at the start of training
        self._device_stream: Tensor | None = None  # of the accelerator, likewise

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the streams of all processes, and the method's name, number of classes and schedule length."""
        # a run resumed after its last step has not restored its stream yet
        streams = [torch.get_rng_state() if self._stream is None else self._stream]
        generators = _accelerator(pl_module)
        if generators is not None:
            streams.append(generators.get_rng_state() if self._device_stream is None else self._device_stream)
        ranks: list[Any] = [streams]
        if several_processes():
            ranks = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, streams)
        names = ("stream", "device_stream")
        checkpoint.setdefault("method", {}).update(
            {name: torch.stack(states) for name, states in zip(names, zip(*ranks, strict=True), strict=False)},
            name=type(pl_module).__name__, num_classes=pl_module.num_classes, schedule_steps=pl_module.schedule_steps,
        )  # fmt: skip

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the values added by :meth:`on_save_checkpoint`."""
        require_same_method(pl_module, checkpoint)
        state = checkpoint.get("method", {})
        if trainer.state.fn == TrainerFn.FITTING:
            resume_evaluation(checkpoint["loops"]["fit_loop"])
            steps = state.get("schedule_steps")
            pl_module.resumed_schedule = None if steps is None else (steps, checkpoint["global_step"])
        self._stream, self._device_stream = _own(state.get("stream")), _own(state.get("device_stream"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the streams that dropout uses, and the position of the loader."""
        restore_loader(trainer)
        if self._stream is not None:
            torch.set_rng_state(self._stream)
        generators, held = _accelerator(pl_module), self._device_stream
        # a state from another kind of accelerator has another size
        if generators is not None and held is not None and held.shape == generators.get_rng_state().shape:
            generators.set_rng_state(held)
        self._stream = self._device_stream = None


def _accelerator(pl_module: L.LightningModule) -> Any:
    """Return torch's module of the accelerator on which a module is, such as ``torch.cuda``; None on the CPU."""
    kind = pl_module.device.type
    return None if kind == "cpu" else torch.get_device_module(kind)


def _own(streams: Tensor | None) -> Tensor | None:
    """Return the state of this process among those of all processes, (W, S); None if there is none.

    With more processes than before, streams repeat until the next epoch reseeds them. The state is cloned, because a view
    causes a segmentation fault in torch 2.14.
    """
    return None if streams is None else streams[process_rank() % len(streams)].clone()


def require_same_method(pl_module: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint has other classes than the data or, when fitting, another method."""
    state, mine = checkpoint.get("method", {}), type(pl_module).__name__
    refuse_other_classes(named_classes(getattr(pl_module._trainer, "datamodule", None)), checkpoint.get("class_names"))
    name, classes = state.get("name", mine), state.get("num_classes", pl_module.num_classes)
    trainer = pl_module._trainer
    fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    if classes != pl_module.num_classes or (fitting and name != mine):
        raise ValueError(
            f"expected a checkpoint of {mine} with {pl_module.num_classes} classes, got one of {name} with "
            f"{classes}; use the method and the data of the checkpoint"
        )
