"""Base class of methods with two networks."""

from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["TwoNetworks"]


class TwoNetworks(NoisyLabelModule):
    """A :class:`NoisyLabelModule` with two networks of the same architecture and different initial weights."""

    num_networks = 2
