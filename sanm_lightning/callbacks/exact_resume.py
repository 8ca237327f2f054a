"""Resume a run so that it ends as one that was never stopped."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sanm_lightning.class_names import named_classes, refuse_other_classes
from sanm_lightning.compat import resume_evaluation
from sanm_lightning.random_streams import process_rank, several_processes

__all__ = ["ExactResume", "require_same_method"]


class ExactResume(L.Callback):
    """Save and restore the global random stream of each process, and check that a checkpoint belongs to the run.

    Dropout draws from the global stream. Everything else that is random has streams named by epoch and step.

    Raises:
        ValueError: if training is resumed from a checkpoint of another method or number of classes, or the learning-rate
            schedule of the checkpoint has another length.
    """

    def __init__(self) -> None:
        self._stream: Tensor | None = None  # restored at the start of training
        self._steps: int | None = None  # length of the schedule in the checkpoint

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the streams of all processes, and the method's name, classes and length of schedule."""
        # a run that is resumed after its last step draws nothing, and its stream is still to be restored
        streams = [torch.get_rng_state() if self._stream is None else self._stream]
        if several_processes():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, streams[0])
            streams = gathered
        checkpoint.setdefault("method", {}).update(
            stream=torch.stack(streams), name=type(pl_module).__name__, num_classes=pl_module.num_classes,
            schedule_steps=pl_module.schedule_steps,
        )  # fmt: skip

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` added."""
        require_same_method(pl_module, checkpoint)
        state = checkpoint.get("method", {})
        if trainer.state.fn == TrainerFn.FITTING:
            resume_evaluation(checkpoint["loops"]["fit_loop"])
            self._steps = state.get("schedule_steps")
        streams = state.get("stream")
        # On more processes than before, a stream is missing until the next epoch draws anew. Cloned: torch 2.14 ends with a
        # segmentation fault when the state is a view.
        self._stream = None if streams is None else streams[process_rank() % len(streams)].clone()

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare the length of the schedule with that of the checkpoint."""
        steps, self._steps = self._steps, None
        if steps is not None and pl_module.schedule_steps not in (None, steps):
            raise ValueError(
                f"expected a training of {steps} steps, the length of the checkpoint's learning-rate schedule, got "
                f"{pl_module.schedule_steps}; give max_epochs, max_steps, batches and processes as they were, or begin a new "
                "run"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the stream, so that dropout draws what it would have drawn."""
        if self._stream is not None:
            torch.set_rng_state(self._stream)
            self._stream = None


def require_same_method(pl_module: Any, checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint has other classes than the data, or (to go on training) is of another method."""
    state, mine = checkpoint.get("method", {}), type(pl_module).__name__
    refuse_other_classes(named_classes(getattr(pl_module._trainer, "datamodule", None)), checkpoint.get("class_names"))
    name, classes = state.get("name", mine), state.get("num_classes", pl_module.num_classes)
    trainer = pl_module._trainer
    fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
    if classes != pl_module.num_classes or (fitting and name != mine):
        raise ValueError(
            f"expected a checkpoint of {mine} with {pl_module.num_classes} classes, got one of {name} with "
            f"{classes}; give the method and the data that it was made with"
        )
