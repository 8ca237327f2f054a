"""Checks common to all methods: arguments, and callbacks of the trainer."""

from typing import Any

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

__all__ = ["check_arguments", "check_callbacks", "check_num_classes"]


def check_arguments(num_classes: Any, image_size: Any, network: Any, warmup_epochs: int, backend: Any) -> None:
    """Raise ValueError if an argument of :class:`~sanm_lightning.methods.NoisyLabelModule` is out of its range."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"expected num_classes >= 2, got {num_classes}; use the num_classes of the data module")
    if image_size is None:
        raise ValueError("expected image_size (H, W) in pixels, got None; use the image_size of the data module")
    if not isinstance(network, (str, nn.Module)):
        raise ValueError(f"expected a network as the name of a timm model or as a module, got {network!r}")
    if warmup_epochs < 0:
        raise ValueError(f"expected warmup_epochs >= 0, got {warmup_epochs}")
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"expected compile_network true, false or one of {', '.join(torch.compiler.list_backends())}, got "
            f"{backend!r}"
        )


def check_num_classes(network: Any, num_classes: int) -> None:
    """Raise ValueError if a network given as a module states another number of classes."""
    classes = getattr(network, "num_classes", num_classes)
    if isinstance(classes, int) and classes != num_classes:
        raise ValueError(
            f"expected a network with num_classes = {num_classes} logits, got {classes} from "
            f"{type(getattr(network, 'network', network)).__name__}; create it with num_classes={num_classes}"
        )


def check_callbacks(pl_module: Any) -> None:
    """Raise ValueError if the trainer has a callback of Lightning that the method does not support."""
    callbacks = [] if pl_module._trainer is None else pl_module._trainer.callbacks
    has_backbone = isinstance(getattr(pl_module, "backbone", None), nn.Module)
    if not has_backbone and any(isinstance(part, BackboneFinetuning) for part in callbacks):
        raise ValueError(
            f"expected a submodule 'backbone' for BackboneFinetuning, got none in {type(pl_module).__name__}; remove the "
            "callback, or define stages() with Stage(frozen=...) in a subclass"
        )
