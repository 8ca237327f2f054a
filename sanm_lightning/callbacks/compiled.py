"""Run the networks of a method through ``torch.compile`` while a trainer uses the module."""

from typing import Any

import lightning as L
import torch

__all__ = ["CompileNetworks"]

HALVES = ("forward_features", "forward_head")


class CompileNetworks(L.Callback):
    """Compile both halves of each network from ``setup`` to ``teardown``.

    The methods call the halves, so that a compiled ``forward`` would serve no training step. Copies, checkpoints and exports
    are those of the plain networks.

    Args:
        backend: name of a ``torch.compile`` backend.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Put the compiled halves before the plain ones."""
        for network in pl_module.networks:
            for half in HALVES:
                if half not in network.__dict__:
                    setattr(network, half, torch.compile(getattr(network, half), backend=self.backend))

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Take them off."""
        for network in pl_module.networks:
            for half in HALVES:
                network.__dict__.pop(half, None)
