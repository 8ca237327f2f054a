"""Run the networks of a method through ``torch.compile`` while a trainer uses the module."""

from typing import Any

import lightning as L
import torch

__all__ = ["CompileNetworks"]

HALVES = ("forward_features", "forward_head")


class CompileNetworks(L.Callback):
    """Compile ``forward_features`` and ``forward_head`` of each network from ``setup`` to ``teardown``.

    The methods call these two functions in training, not ``forward``. Copies, checkpoints and exports contain the
    uncompiled networks.

    Args:
        backend: name of a ``torch.compile`` backend.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Override both functions by their compiled versions."""
        for network in pl_module.networks:
            for half in HALVES:
                if half not in network.__dict__:
                    setattr(network, half, torch.compile(getattr(network, half), backend=self.backend))

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Remove the compiled versions."""
        for network in pl_module.networks:
            for half in HALVES:
                network.__dict__.pop(half, None)
