"""Run the networks of a method through ``torch.compile`` while a trainer uses the module."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch

__all__ = ["CompileNetworks"]

HALVES = ("forward_features", "forward_head")


class CompileNetworks(L.Callback):
    """Compile ``forward_features`` and ``forward_head`` of each network from ``setup`` to ``teardown``.

    The methods call these two functions in training, not ``forward``. Networks whose feature map is read by hooks are
    compiled as a whole. Copies, checkpoints and exports contain the uncompiled networks.

    Args:
        backend: name of a ``torch.compile`` backend.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Override both functions by their compiled versions."""
        for owner, name in _parts(pl_module):
            if name not in owner.__dict__:
                setattr(owner, name, torch.compile(getattr(owner, name), backend=self.backend))

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Remove the compiled versions."""
        for owner, name in _parts(pl_module):
            owner.__dict__.pop(name, None)


def _parts(pl_module: Any) -> Iterator[tuple[Any, str]]:
    """Return the functions to compile, as owner and name."""
    for network in pl_module.networks:
        if getattr(network, "hooked", False):
            yield network.network, "forward"
        else:
            yield from ((network, half) for half in HALVES)
