"""State of a method that weight averages leave unchanged."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sanm_lightning.compat import fill_average

__all__ = ["Unaveraged", "UnaveragedState"]


class Unaveraged(nn.Module):
    """Base class of modules with tensors that are moved and saved as buffers are, but not averaged.

    Lightning's ``WeightAveraging`` averages all buffers, and truncates the averages of integers. The state of a method, such
    as a threshold or a queue, is not a statistic of the weights, and its average has no meaning.
    """

    def register_state(self, name: str, value: Any, *, cast: bool = True) -> None:
        """Add a tensor, or a named tuple of tensors, which is moved and saved as buffers would be.

        In contrast to a buffer, DistributedDataParallel does not broadcast it: compute the same value in every process. After
        the start of an epoch, the values are those of rank 0.

        Args:
            name: name of the attribute, and of the entry in the state dict; the entries of a named tuple are ``name_field``.
            value: initial value, of any shape; a loaded value has the same shape.
            cast: whether the dtype of floating values follows that of the module, as that of buffers; with True, a run that is
                resumed in bf16-true or 16-true starts with rounded values.
        """
        self.__dict__.setdefault("_state_names", {})[name] = cast
        setattr(self, name, value)

    def registered_state(self) -> dict[str, Tensor]:
        """Return the registered tensors of this module, without those of its submodules, by name in the state dict."""
        found: dict[str, Tensor] = {}
        for name in self.__dict__.get("_state_names", {}):
            value: Any = getattr(self, name)
            if isinstance(value, Tensor):
                found[name] = value
            else:
                found.update({f"{name}_{field}": part for field, part in value._asdict().items()})
        return found

    def map_state(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every registered tensor of this module by a function of it."""
        for name in self.__dict__.get("_state_names", {}):
            self._map_value(name, fn)

    def _map_value(self, name: str, fn: Callable[[Tensor], Tensor]) -> None:
        value: Any = getattr(self, name)
        setattr(self, name, fn(value) if isinstance(value, Tensor) else value._make(map(fn, value)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, cast in self.__dict__.get("_state_names", {}).items():
            self._map_value(name, fn if cast else lambda value: value.to(fn(value).device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": value.detach() for name, value in self.registered_state().items()})

    @torch.no_grad()
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs)
        self.map_state(torch.Tensor.contiguous)  # not those of an expanded view, which cannot be written
        own = {f"{prefix}{name}": value for name, value in self.registered_state().items()}
        unexpected_keys += [key for key in unexpected if key not in own]
        for key, value in own.items():
            if key not in state_dict:
                missing_keys += [key] if strict else []
            elif state_dict[key].shape != value.shape:
                shapes = f"{tuple(value.shape)}, got {tuple(state_dict[key].shape)}"
                error_msgs.append(f"expected {key} of shape {shapes}")
            else:
                value.copy_(state_dict[key])


class UnaveragedState(L.Callback):
    """Save the current state with averaged weights, see :class:`Unaveraged`, and evaluate the network without an average.

    Before the first update of an average, and between a reset of the network and the next update, Lightning's callbacks hold
    the weights of the start of the fit, or of the network before its reset. They are replaced by the current ones.
    """

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights to averages without an update, which are then evaluated."""
        self._fill_averages(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights to averages without an update, which become the final weights at the end of training."""
        self._fill_averages(trainer, pl_module)

    def _fill_averages(self, trainer: Any, pl_module: L.LightningModule) -> None:
        for callback in trainer.callbacks:
            fill_average(callback, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace averages without an update, and the state of the averaged module, which is that of the start of the fit."""
        self._fill_averages(trainer, pl_module)  # the checkpoint has the tensors of the average
        if "current_model_state" not in checkpoint:  # added by WeightAveraging, which replaces state_dict
            return
        for prefix, part in pl_module.named_modules():
            for name in part.registered_state() if isinstance(part, Unaveraged) else ():
                key = f"{prefix}.{name}" if prefix else name
                if key in checkpoint["state_dict"]:
                    checkpoint["state_dict"][key] = checkpoint["current_model_state"][key]
