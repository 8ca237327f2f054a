"""Size, sync and save every per-sample state of a module."""

from typing import Any

import lightning as L
from torch import nn

from sanm_lightning.per_sample import SampleState

__all__ = ["SampleStateCallback", "size_states", "write_synced_states"]


class SampleStateCallback(L.Callback):
    """Find every :class:`~sanm_lightning.per_sample.SampleState` of a module and take care of it.

    The states are sized in ``setup``, which precedes the load of a checkpoint, synced at the end of every epoch, and saved
    with what all processes know.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give every state the size of the training set.

        Raises:
            ValueError: if a state needs the size and the data do not tell it.
        """
        if stage == "fit":
            size_states(pl_module, trainer, type(pl_module).__name__)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sync every state. A collective."""
        for _, state in _states(pl_module):
            state.sync()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what all processes know. A collective."""
        write_synced_states(pl_module, checkpoint["state_dict"])


def size_states(module: nn.Module, trainer: L.Trainer, owner: str) -> None:
    """Give the states of ``module`` the size of the training set, where they do not have it.

    Args:
        module: whose states are sized.
        trainer: its data module tells the size by ``num_samples``, and given labels by ``labels``.
        owner: name for the error.

    Raises:
        ValueError: if a required state cannot be sized.
    """
    data = getattr(trainer, "datamodule", None)
    num_samples = getattr(data, "num_samples", None)
    for _, state in _states(module):
        if isinstance(num_samples, int):
            if len(state) != num_samples:
                state.reset(num_samples, getattr(data, "labels", None))
        elif state.required:
            raise ValueError(
                f"expected a data module with num_samples for {owner}, which keeps state of each sample, got "
                f"{type(data).__name__}; use a data module of this package, or add num_samples to yours"
            )


def write_synced_states(module: nn.Module, state_dict: dict[str, Any], prefix: str = "") -> None:
    """Put what all processes know into a state dict of ``module``. A collective.

    Args:
        module: whose states are written.
        state_dict: of the module; its entries of per-sample states are replaced.
        prefix: of the module's keys.
    """
    for name, state in _states(module):
        key = f"{prefix}{name}._extra_state"
        synced = state.synced_state()  # in every process, whatever this one saves
        if key in state_dict:
            state_dict[key] = synced


def _states(module: nn.Module) -> list[tuple[str, SampleState]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, SampleState)]
