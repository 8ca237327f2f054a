"""Reinitialize the networks of a method during training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sanm_lightning.callbacks.stages import reset_parameters
from sanm_lightning.methods.ema import EMA

__all__ = ["reset_networks"]


@torch.no_grad()
def reset_networks(module: Any, create: Callable[[], Any] | None, head_only: bool) -> list[nn.Parameter]:
    """Reinitialize the networks of ``module`` in place, or their classifiers only.

    Decoders and averaged copies are reset with their network; the averages restart from the new weights.

    Args:
        module: method with ``networks`` and ``sanms``.
        create: function that creates a new network; None calls ``reset_parameters`` of every submodule that has it.
        head_only: whether to reset the classifiers only.

    Returns:
        The reinitialized parameters, whose optimizer state should be deleted.
    """
    drawn: list[nn.Parameter] = []
    for network, sanm in zip(module.networks, module.sanms, strict=True):
        parts: list[nn.Module] = [network.get_classifier()] if head_only else [network]
        if head_only or create is None:
            parts[0].apply(reset_parameters)
        else:
            network.load_state_dict(create().state_dict())
        if not head_only and sanm.decoder is not None:
            sanm.decoder.apply(reset_parameters)
            parts.append(sanm.decoder)
        drawn += [parameter for part in parts for parameter in part.parameters()]
    if not head_only:
        for average in (part for part in module.modules() if isinstance(part, EMA)):
            average.restart()
    return drawn
