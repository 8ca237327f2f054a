"""Batches of modules that know nothing of SANM: read, and built again with other images and labels."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

__all__ = ["images_and_labels", "probabilities", "rebuilt", "tensor_or_none"]


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the first two parts of a batch, which must be tensors."""
    if isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2]):
        return batch[0], batch[1]
    raise MisconfigurationException(
        f"SANM expected batches (images, labels, ...) of tensors, got {type(batch).__name__}; call SANM in the step yourself "
        "for batches of another shape"
    )


def tensor_or_none(batch: Any, name: str) -> Tensor | None:
    """Return a named part of a batch, where it has one."""
    part = getattr(batch, name, None)  # every list and tuple has a method called index
    return part if isinstance(part, Tensor) else None


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) of indices or (B, C) of probabilities -> (B, C), floating."""
    if labels.ndim == 2 and labels.is_floating_point():
        return labels
    if labels.ndim == 1 and not labels.is_floating_point():
        return F.one_hot(labels.long(), num_classes).float()
    raise MisconfigurationException(
        "SANM expected labels (B,) of class indices or (B, C) of class probabilities, got "
        f"{tuple(labels.shape)} of {labels.dtype}"
    )


def rebuilt(batch: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Any:
    """Return a new batch of the same kind with other images and labels, and the asked rows of what else is per sample."""
    size = len(batch[0])
    rest = [part[rows] if isinstance(part, Tensor) and part.ndim and len(part) == size else part for part in batch[2:]]
    parts = [images, labels, *rest]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
