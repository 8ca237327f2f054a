"""Mixin that applies SANM to a LightningModule."""

import functools
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import lightning as L

from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.checks import require_owned, require_unused
from sanm_lightning.sanm.foreign_checkpoint import forgive, split_from_state_dict
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.normalization import Normalization
from sanm_lightning.state_callback import SampleStateCallback

__all__ = ["SANMMixin"]


DEFAULTS = {"rehearse": True}
"""Defaults of the arguments of SANMCallback that are not None."""


class SANMMixin:
    """Apply SANM to a LightningModule with a standard ``training_step`` on ``(x, y)`` batches.

    ::

        class Mine(SANMMixin, L.LightningModule):
            ...

    The mixin must be the first base class. The module contains ``self.sanm``, whose parameters, state and options are
    saved in its checkpoints under ``sanm``, so that the class without the mixin loads them. The mixin attaches a
    :class:`SANMCallback`; its documentation of losses, labels, images, label quality, metrics and errors applies.

    Args:
        sanm: SANM with its options, or a dictionary of options, as in checkpoints; None means ``SANM()``.
        sanm_network: name of the classifier submodule; None detects it.
        sanm_layer: name of the network's submodule whose output is the last feature map; None detects it.
        sanm_image_size: H, W of the training images; None uses that of the data module, or of a batch.
        sanm_rehearse: see :class:`SANMCallback`.
        sanm_index: see ``index`` of :class:`SANMCallback`.
        sanm_mean: mean of the normalization of the images, see ``mean`` of :class:`SANMCallback`.
        sanm_std: standard deviation of the normalization of the images.

    All other arguments are passed to the next base class.

    Raises:
        ValueError: if an option of SANM is out of its range, the SANM is built for the network of another module, or (when a
            trainer uses the module) another module was created with the same SANM.
    """

    sanm: SANM
    _sanm_owner: object = None
    wraps_training_step = True
    """Whether to wrap the training step; False in classes whose training step calls ``self.sanm``."""

    def __init__(
        self,
        *args: Any,
        sanm: SANM | dict[str, Any] | None = None,
        sanm_network: str | None = None,
        sanm_layer: str | None = None,
        sanm_image_size: tuple[int, int] | None = None,
        sanm_rehearse: bool = True,
        sanm_index: bool | None = None,
        sanm_mean: float | Sequence[float] | None = None,
        sanm_std: float | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sanm = sanm if isinstance(sanm, SANM) else SANM.from_options(sanm or {})
        require_unused(self.sanm)
        self.sanm.owner = self._sanm_owner = object()
        self._sanm_options: dict[str, Any] = {
            "network": sanm_network, "layer": sanm_layer, "image_size": sanm_image_size, "rehearse": sanm_rehearse,
            "index": sanm_index, "mean": sanm_mean, "std": sanm_std,
        }  # fmt: skip
        self.sanm.normalization = Normalization.from_arguments(sanm_mean, sanm_std) or self.sanm.normalization
        self._sanm_is_default = sanm is None
        if self.wraps_training_step:
            self.register_load_state_dict_post_hook(functools.partial(forgive, "sanm."))  # type: ignore[attr-defined]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Extend classes that override hooks for callbacks or checkpoints, with or without ``super()``."""
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if L.LightningModule in bases and bases.index(L.LightningModule) < bases.index(SANMMixin):
            raise TypeError(
                f"expected SANMMixin before LightningModule among the bases of {cls.__name__}, got it after "
                f"LightningModule, where it has no effect; write class {cls.__name__}(SANMMixin, L.LightningModule)"
            )
        if "configure_callbacks" in cls.__dict__:
            own = cls.configure_callbacks

            @functools.wraps(own)
            def configure_callbacks(self: "SANMMixin") -> list[Any]:
                return self._with_sanm(own(self))

            cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]
        for name, part in (("on_save_checkpoint", "_split_checkpoint"), ("on_load_checkpoint", "_join_checkpoint")):
            if name in cls.__dict__:
                setattr(cls, name, _followed_by(cls.__dict__[name], part))

    def configure_callbacks(self) -> list[Any]:
        """Add SANM's callbacks to those of the other base classes."""
        return self._with_sanm(super().configure_callbacks())  # type: ignore[misc]

    def _with_sanm(self, callbacks: Any) -> list[Any]:
        found = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        kinds = tuple(type(callback) for callback in found)
        return [*found, *(own for own in self._own_callbacks() if not issubclass(type(own), kinds))]

    def _own_callbacks(self) -> list[Any]:
        """Return the callbacks that SANM requires."""
        require_owned(self.sanm, self._sanm_owner)
        return [SampleStateCallback(), SANMCallback(self.sanm, wrap=self.wraps_training_step, **self._sanm_options)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move state and options of SANM to the key ``sanm`` of the checkpoint."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        self._split_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of SANM, and in ``load_from_checkpoint`` the options that are not given."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._join_checkpoint(checkpoint)

    def _split_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.wraps_training_step or "sanm" in checkpoint:
            return
        options = checkpoint.get("hyper_parameters", {})
        parameters = inspect.signature(type(self).__init__).parameters
        required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        own = inspect.signature(SANMMixin.__init__).parameters.keys() - {"self", "args", "kwargs"} - required
        checkpoint["sanm"] = {
            "options": self.sanm.saved_options,
            "arguments": self._sanm_options,
            "hyper_parameters": {name: options.pop(name) for name in own & options.keys()},
            "state_dict": split_from_state_dict(checkpoint["state_dict"], "sanm."),
        }

    def _join_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("sanm")
        if not self.wraps_training_step or saved is None:
            return
        if self._trainer is None and self._sanm_is_default:  # type: ignore[attr-defined]
            self.sanm, self._sanm_is_default = SANM.from_options(saved["options"]), False
            given = {name: value for name, value in self._sanm_options.items() if value is not DEFAULTS.get(name)}
            self._sanm_options = {**saved["arguments"], **given}
            self.hparams.update(saved["hyper_parameters"])  # type: ignore[attr-defined]
        checkpoint["state_dict"].update({f"sanm.{name}": value for name, value in saved["state_dict"].items()})

    def _set_hparams(self, hp: Any) -> None:
        """Save SANM as built-in types in ``save_hyperparameters``, which load safely from a checkpoint."""
        if isinstance(hp, MutableMapping) and isinstance(hp.get("sanm"), SANM):
            hp = {**hp, "sanm": hp["sanm"].saved_options}
        super()._set_hparams(hp)  # type: ignore[misc]


def _followed_by(hook: Callable[..., Any], part: str) -> Callable[..., Any]:
    """Return a hook of a module that afterwards calls one of its methods with the same arguments."""

    @functools.wraps(hook)
    def extended(self: SANMMixin, checkpoint: dict[str, Any]) -> Any:
        out = hook(self, checkpoint)
        getattr(self, part)(checkpoint)
        return out

    return extended
