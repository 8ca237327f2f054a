"""Label quality used in training, for records, lists and pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.sanm.module import SANM

__all__ = ["estimated_quality", "own_estimate"]


def own_estimate(module: Any, sanms: Sequence[SANM]) -> Tensor | None:
    """Return a method's own estimate of label quality, (N,); None if it has none or a configured estimator replaces it.

    Args:
        module: module in training.
        sanms: active SANMs of the module.
    """
    own = getattr(module, "label_quality", None)
    return own() if callable(own) and not any(sanm.quality == "given" for sanm in sanms) else None


def estimated_quality(module: Any, sanms: Sequence[SANM]) -> Tensor | None:
    """Return the label quality used in training.

    In order of precedence: the quality of a configured estimator, the method's own estimate, and the loss mixture of SANM.
    The quality of several networks is averaged.

    Args:
        module: module in training.
        sanms: active SANMs of the module, one per network.

    Returns:
        Quality of the training labels, shape (N,), in [0, 1], on the CPU; None if it is unknown or not known by index.
    """
    quality = own_estimate(module, sanms)
    if quality is None:
        parts = [part for sanm in sanms if (part := sanm.label_quality.values) is not None]
        quality = torch.stack(parts).mean(0) if parts else None
    return None if quality is None else quality.detach().float().cpu().clone()
