"""Base of methods with two networks."""

from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["TwoNetworks"]


class TwoNetworks(NoisyLabelModule):
    """A :class:`NoisyLabelModule` with two networks of one kind and different first weights."""

    num_networks = 2
