"""SANM as a base class: one line in the definition of a LightningModule."""

import functools
from collections.abc import MutableMapping
from typing import Any

import lightning as L

from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.module import SANM
from sanm_lightning.state_callback import SampleStateCallback

__all__ = ["SANMMixin"]


class SANMMixin:
    """Lay SANM over a LightningModule with an ordinary ``training_step`` on ``(x, y)`` batches.

    ::

        class Mine(SANMMixin, L.LightningModule):
            ...

    The mixin comes first among the bases. The module then holds ``self.sanm``: parameters, state dict and options are its own,
    and a checkpoint restores all. The work is done by :class:`SANMCallback`, which the mixin attaches; what that says of
    losses, labels, images, label quality, figures and errors holds here.

    Args:
        sanm: hyper-parameters and parts; None means ``SANM()``. A dictionary of them is what a checkpoint holds.
        sanm_network: name of the submodule that classifies; None finds it.
        sanm_layer: name of that network's submodule whose output is the last feature map; None finds it.
        sanm_image_size: H, W of the training images; None takes that of the data module, or else of a batch.
        sanm_rehearse: see :class:`SANMCallback`.

    All other arguments go to the next base class.

    Raises:
        ValueError: if an option of SANM is out of its range.
    """

    sanm: SANM
    wraps_training_step = True
    """False in a class whose own training step calls ``self.sanm``."""

    def __init__(
        self,
        *args: Any,
        sanm: SANM | dict[str, Any] | None = None,
        sanm_network: str | None = None,
        sanm_layer: str | None = None,
        sanm_image_size: tuple[int, int] | None = None,
        sanm_rehearse: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sanm = sanm if isinstance(sanm, SANM) else SANM.from_options(sanm or {})
        self._sanm_options: dict[str, Any] = {
            "network": sanm_network, "layer": sanm_layer, "image_size": sanm_image_size, "rehearse": sanm_rehearse,
        }  # fmt: skip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Add SANM's callbacks to those of a class that overrides ``configure_callbacks``, with or without ``super()``."""
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if L.LightningModule in bases and bases.index(L.LightningModule) < bases.index(SANMMixin):
            raise TypeError(
                f"expected SANMMixin before LightningModule among the bases of {cls.__name__}, got it after, where it does "
                f"nothing; write class {cls.__name__}(SANMMixin, L.LightningModule)"
            )
        if "configure_callbacks" in cls.__dict__:
            own = cls.configure_callbacks

            @functools.wraps(own)
            def configure_callbacks(self: "SANMMixin") -> list[Any]:
                return self._with_sanm(own(self))

            cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]

    def configure_callbacks(self) -> list[Any]:
        """Attach the callback that does the work, after the callbacks of the other bases."""
        return self._with_sanm(super().configure_callbacks())  # type: ignore[misc]

    def _with_sanm(self, callbacks: Any) -> list[Any]:
        found = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        kinds = tuple(type(callback) for callback in found)
        return [*found, *(own for own in self._own_callbacks() if not issubclass(type(own), kinds))]

    def _own_callbacks(self) -> list[Any]:
        """The callbacks without which the module would not be under SANM."""
        return [SampleStateCallback(), SANMCallback(self.sanm, wrap=self.wraps_training_step, **self._sanm_options)]

    def _set_hparams(self, hp: Any) -> None:
        """Let ``save_hyperparameters`` record SANM as plain Python, so that a checkpoint opens safely."""
        if isinstance(hp, MutableMapping) and isinstance(hp.get("sanm"), SANM):
            hp = {**hp, "sanm": hp["sanm"].saved_options}
        super()._set_hparams(hp)  # type: ignore[misc]
