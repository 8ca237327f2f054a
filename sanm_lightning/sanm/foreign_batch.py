"""Read batches of third-party modules, and rebuild them with other images and labels."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

__all__ = [
    "SampleIndex",
    "has_third_index",
    "images_and_labels",
    "probabilities",
    "rebuilt",
    "tensor_or_none",
]


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the first two elements of a batch, images (B, C, H, W) and labels.

    Raises:
        MisconfigurationException: if they are not tensors, or the first one does not have four dimensions.
    """
    if not (isinstance(batch, Sequence) and len(batch) >= 2 and all(isinstance(part, Tensor) for part in batch[:2])):
        raise MisconfigurationException(
            f"expected batches (images, labels, ...) of tensors for SANM, got {type(batch).__name__}; for other "
            "batches, call SANM in the training step"
        )
    images, labels = batch[0], batch[1]
    if images.ndim != 4:
        shapes = ", ".join(
            str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in batch
        )
        raise MisconfigurationException(
            f"expected batches (images, labels, ...) with images (B, C, H, W) first for SANM, got elements {shapes}; "
            "return (image, label, index) from the data set"
        )
    return images, labels


def tensor_or_none(batch: Any, name: str) -> Tensor | None:
    """Return a named tensor of a batch; None if there is none."""
    part = getattr(batch, name, None)  # every list and tuple has a method called index
    return part if isinstance(part, Tensor) else None


def has_third_index(batch: Any, num_samples: int) -> bool:
    """Return whether the third element of a tuple or list can be the positions of the samples in the training set.

    The positions are integers, shape (B,), all different, in [0, N). Labels of four or more samples are rarely so, and
    smaller batches return False. It synchronizes with the device.

    Args:
        batch: batch of a third-party loader.
        num_samples: N, size of the training set.
    """
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "_fields") or len(batch) < 3:
        return False
    third, size = batch[2], len(batch[0])
    if not isinstance(third, Tensor) or third.is_floating_point() or third.dtype == torch.bool:
        return False
    if third.shape != (size,) or size < 4:
        return False
    values = third.tolist()
    return len(set(values)) == size and min(values) >= 0 and max(values) < num_samples


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Convert labels, indices (B,) of any integer dtype or probabilities (B, C), to probabilities (B, C), floating.

    Indices outside [0, C) become rows of zeros.

    Raises:
        MisconfigurationException: if the labels have another shape or dtype.
    """
    if labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] == num_classes:
        return labels
    if labels.ndim == 1 and not labels.is_floating_point():
        return (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    raise MisconfigurationException(
        f"expected labels (B,) of class indices or (B, C) of class probabilities for the C = {num_classes} logits of the "
        f"network for SANM, got {tuple(labels.shape)} of {labels.dtype}; convert them in the data set"
    )


def rebuilt(batch: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Any:
    """Return a batch of the same type with other images and labels, and ``rows`` of further per-sample elements."""
    size = len(batch[0])
    rest = [part[rows] if isinstance(part, Tensor) and part.ndim and len(part) == size else part for part in batch[2:]]
    parts = [images, labels, *rest]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


class SampleIndex:
    """Find the position of each sample in the training set in batches of third-party loaders.

    Args:
        third: whether it is the third element of tuple batches; None determines it on the first batch and logs the result.
    """

    def __init__(self, third: bool | None = None) -> None:
        self.third = third

    def __call__(self, batch: Any, trainer: Any) -> Tensor | None:
        """Return the positions (B,), int64; None if unknown, or without ``num_samples`` of the data module.

        Raises:
            MisconfigurationException: if a batch has no third element, but must have one.
        """
        named = tensor_or_none(batch, "index")
        num_samples = getattr(getattr(trainer, "datamodule", None), "num_samples", None)
        if named is not None or not isinstance(num_samples, int):
            return None if named is None else named.long()
        if self.third is None:
            self.third = has_third_index(batch, num_samples)
            found = "the third element of the batches" if self.third else "none"
            rank_zero_info(f"SANM: index of the samples in the batches: {found} (index= of the callback overrides it)")
        if not self.third:
            return None
        if len(batch) < 3:
            raise MisconfigurationException(
                f"expected batches (images, labels, index) for SANM with index=True, got {len(batch)} elements; add the "
                "index to the data set, or omit index="
            )
        third: Tensor = batch[2]
        return third.long()
