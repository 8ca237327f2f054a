"""Resize, synchronize and save all per-sample states of a module."""

import zlib
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sanm_lightning.per_sample import SampleState

__all__ = ["SampleStateCallback", "size_states", "write_synced_states"]


class SampleStateCallback(L.Callback):
    """Manage every :class:`~sanm_lightning.per_sample.SampleState` of a module.

    The states are resized in ``setup``, before a checkpoint is loaded, synchronized at the end of every epoch, and
    saved with the values of all processes.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resize every state to the size of the training set.

        Raises:
            ValueError: if a state requires the size and the data module has no ``num_samples``.
        """
        if stage == "fit":
            size_states(pl_module, trainer, type(pl_module).__name__)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the states of a checkpoint are those of the training set.

        Raises:
            ValueError: if they have another number of rows, or belong to other given labels.
        """
        num_samples, labels = _training_set(trainer)
        given = _checksum(labels)
        for name, state in _states(pl_module):
            if num_samples is not None and not _belongs(state, num_samples, given):
                got = "other given labels" if len(state) == num_samples else f"{num_samples} samples"
                raise ValueError(
                    f"expected the training set of the checkpoint, with {len(state)} samples, for the per-sample state "
                    f"{name!r} of {type(pl_module).__name__}, got {got}; use the same training set, or start a new run from "
                    "the weights"
                )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Synchronize every state. A collective operation."""
        for _, state in _states(pl_module):
            state.sync()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the values of all processes. A collective operation."""
        averaging = checkpoint.get("current_model_state")  # of WeightAveraging, which replaces the weights only
        for state_dict in (checkpoint["state_dict"], *([] if averaging is None else [averaging])):
            write_synced_states(pl_module, state_dict)


def size_states(module: nn.Module, trainer: L.Trainer, owner: str) -> None:
    """Resize the states of ``module`` to the size of the training set, and reset those of other given labels.

    Args:
        module: module that contains the states.
        trainer: trainer whose data module defines the size as ``num_samples``, and given labels as ``labels``.
        owner: name of the method for the error message.

    Raises:
        ValueError: if the size of a required state is unknown.
    """
    num_samples, labels = _training_set(trainer)
    given, others = _checksum(labels), []
    for name, state in _states(module):
        if num_samples is not None:
            if not _belongs(state, num_samples, given):
                others += [name] if len(state) == num_samples else []
                state.reset(num_samples, labels)
            state.given = given
        elif state.required:
            raise ValueError(
                f"expected a data module with num_samples for {owner}, which keeps per-sample state, got "
                f"{type(getattr(trainer, 'datamodule', None)).__name__}; use a data module of this package, or add num_samples"
            )
    if others:
        rank_zero_warn(
            f"expected the given labels of the earlier training of {owner}, got other labels; its per-sample state "
            f"({', '.join(others)}) starts anew"
        )


def write_synced_states(module: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> None:
    """Write the values of all processes to a state dict of ``module``. A collective operation.

    Args:
        module: module that contains the states.
        state_dict: state dict of the module; its entries of per-sample states are replaced.
        prefix: prefix of the module's keys.
    """
    for name, state in _states(module):
        key = f"{prefix}{name}._extra_state"
        synced = state.synced_state()  # in every process, also in those that save nothing
        if key in state_dict:
            state_dict[key] = synced


def _states(module: nn.Module) -> list[tuple[str, SampleState]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, SampleState)]


def _training_set(trainer: L.Trainer) -> tuple[int | None, Tensor | None]:
    """Return the number of training samples and the given labels (N,); None if the data module does not define them."""
    data = getattr(trainer, "datamodule", None)
    num_samples, labels = getattr(data, "num_samples", None), getattr(data, "labels", None)
    return num_samples if isinstance(num_samples, int) else None, labels if isinstance(labels, Tensor) else None


def _checksum(labels: Tensor | None) -> int | None:
    return None if labels is None else zlib.crc32(labels.cpu().numpy().tobytes())


def _belongs(state: SampleState, num_samples: int, given: int | None) -> bool:
    """Return whether the rows of a state are those of a training set, by number and, where known, by given labels."""
    return len(state) == num_samples and (None in (given, state.given) or given == state.given)
