"""SANM as a base class: one line in the definition of a LightningModule."""

from typing import Any

from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.module import SANM

__all__ = ["SANMMixin"]


class SANMMixin:
    """Lay SANM over a LightningModule with an ordinary ``training_step`` on ``(x, y)`` batches.

    ::

        class Mine(SANMMixin, L.LightningModule):
            ...

    The module then holds ``self.sanm``: parameters, state dict and options are its own, and a checkpoint restores all. The work
    is done by :class:`SANMCallback`, which the mixin attaches; what that says of losses, labels and label quality holds here.

    Args:
        sanm: hyper-parameters and parts; None means ``SANM()``.
        sanm_network: name of the submodule that classifies; None finds it.
        sanm_layer: name of that network's submodule whose output is the last feature map; None finds it.

    All other arguments go to the next base class.
    """

    sanm: SANM
    wraps_training_step = True
    """False in a class whose own training step calls ``self.sanm``."""
    warmup_epochs: int = 1
    """Epochs before the first mask, unless ``sanm`` has a number of its own."""

    def __init__(
        self,
        *args: Any,
        sanm: SANM | None = None,
        sanm_network: str | None = None,
        sanm_layer: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sanm = SANM() if sanm is None else sanm
        self._sanm_network, self._sanm_layer = sanm_network, sanm_layer

    def configure_callbacks(self) -> list[Any]:
        """Attach the callback that does the work, after the callbacks of the class itself."""
        own = super().configure_callbacks()  # type: ignore[misc]
        callback = SANMCallback(
            self.sanm,
            network=self._sanm_network,
            layer=self._sanm_layer,
            warmup_epochs=self.warmup_epochs,
            wrap=self.wraps_training_step,
        )
        return [*(own if isinstance(own, (list, tuple)) else [own]), callback]
