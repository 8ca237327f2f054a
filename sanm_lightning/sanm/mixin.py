"""Mixin that applies SANM to a LightningModule."""

import functools
from collections.abc import MutableMapping
from typing import Any

import lightning as L

from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.module import SANM
from sanm_lightning.state_callback import SampleStateCallback

__all__ = ["SANMMixin"]


class SANMMixin:
    """Apply SANM to a LightningModule with a standard ``training_step`` on ``(x, y)`` batches.

    ::

        class Mine(SANMMixin, L.LightningModule):
            ...

    The mixin must be the first base class. The module contains ``self.sanm``, whose parameters, state and options are
    saved in its checkpoints. The mixin attaches a :class:`SANMCallback`; its documentation of losses, labels, images,
    label quality, metrics and errors applies.

    Args:
        sanm: SANM with its options, or a dictionary of options, as in checkpoints; None means ``SANM()``.
        sanm_network: name of the classifier submodule; None detects it.
        sanm_layer: name of the network's submodule whose output is the last feature map; None detects it.
        sanm_image_size: H, W of the training images; None uses that of the data module, or of a batch.
        sanm_rehearse: see :class:`SANMCallback`.
        sanm_index: see ``index`` of :class:`SANMCallback`.

    All other arguments are passed to the next base class.

    Raises:
        ValueError: if an option of SANM is out of its range.
    """

    sanm: SANM
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sanm = sanm if isinstance(sanm, SANM) else SANM.from_options(sanm or {})
        self._sanm_options: dict[str, Any] = {
            "network": sanm_network, "layer": sanm_layer, "image_size": sanm_image_size, "rehearse": sanm_rehearse,
            "index": sanm_index,
        }  # fmt: skip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Add SANM's callbacks in classes that override ``configure_callbacks``, with or without ``super()``."""
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

    def configure_callbacks(self) -> list[Any]:
        """Add SANM's callbacks to those of the other base classes."""
        return self._with_sanm(super().configure_callbacks())  # type: ignore[misc]

    def _with_sanm(self, callbacks: Any) -> list[Any]:
        found = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        kinds = tuple(type(callback) for callback in found)
        return [*found, *(own for own in self._own_callbacks() if not issubclass(type(own), kinds))]

    def _own_callbacks(self) -> list[Any]:
        """Return the callbacks that SANM requires."""
        return [SampleStateCallback(), SANMCallback(self.sanm, wrap=self.wraps_training_step, **self._sanm_options)]

    def _set_hparams(self, hp: Any) -> None:
        """Save SANM as built-in types in ``save_hyperparameters``, which load safely from a checkpoint."""
        if isinstance(hp, MutableMapping) and isinstance(hp.get("sanm"), SANM):
            hp = {**hp, "sanm": hp["sanm"].saved_options}
        super()._set_hparams(hp)  # type: ignore[misc]
