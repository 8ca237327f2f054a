"""What the data module and the methods exchange."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["EpochPlan", "NoisyBatch", "View"]

View = str | tuple[str, ...]
"""A policy for all samples of a row, or one policy for each of several equal, consecutive blocks of it."""

_KEYS = {
    "images": ("images", "image", "x", "inputs", "input", "pixel_values"),
    "labels": ("labels", "label", "y", "targets", "target"),
    "index": ("index",),
    "true_labels": ("true_labels",),
}


class NoisyBatch(NamedTuple):
    """One batch of images whose labels may be wrong.

    A plain named tuple: ``images, labels, *_ = batch`` and ``batch[0]`` work as for the usual ``(x, y)`` pair.

    Attributes:
        images: shape (B, 3, H, W), floating, in [0, 1].
        labels: the given, possibly wrong class indices, shape (B,), int64.
        index: position of each sample in the training set, shape (B,), int64; None where samples have no identity.
        true_labels: the right class indices, shape (B,), int64, where they are known; None elsewhere. Read by metrics
            and by oracle label quality, and by nothing else.
        views: the views that the method declared, in order, each of the shape of ``images``; ``images`` is the first.
            Empty in batches of foreign loaders.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    true_labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    @classmethod
    def from_any(cls, batch: Any, need_labels: bool = True) -> "NoisyBatch":
        """Read a batch of any usual form.

        Args:
            batch: a :class:`NoisyBatch`; a tuple or list ``(images, labels, ...)``, whose further parts are not read;
                ``(images,)`` or a tensor of images alone; a mapping, a named tuple or an object with names such as
                ``images``, ``image``, ``x`` and ``labels``, ``label``, ``y``, and optionally ``index`` and ``true_labels``.
            need_labels: whether labels are required; without labels, ``labels`` is an empty tensor.

        Raises:
            ValueError: if there are no images, or labels are required and there are none.
        """
        if isinstance(batch, NoisyBatch):
            return batch
        parts: dict[str, Any] = {}
        if isinstance(batch, Tensor):
            parts["images"] = batch
        elif isinstance(batch, Mapping) or not isinstance(batch, (list, tuple)) or hasattr(batch, "_fields"):
            read = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
            for part, names in _KEYS.items():
                parts[part] = next((found for name in names if isinstance(found := read(name), Tensor)), None)
        if parts.get("images") is None and isinstance(batch, Sequence):
            parts.update(zip(("images", "labels"), batch, strict=False))
        images, labels = parts.get("images"), parts.get("labels")
        if not isinstance(images, Tensor):
            raise ValueError(
                f"expected a batch NoisyBatch, (images, labels, ...) or a mapping with 'images', got {_form(batch)}; return "
                "tensors from the data set"
            )
        if not isinstance(labels, Tensor):
            if need_labels:
                raise ValueError(
                    f"expected a batch with labels, got {_form(batch)}; return NoisyBatch or (images, labels) from the loader"
                )
            labels = torch.zeros(0, dtype=torch.int64, device=images.device)
        return cls(images, labels, parts.get("index"), parts.get("true_labels"))

    def take(self, rows: Any) -> "NoisyBatch":
        """Return some rows of the batch: a slice, or positions (K,)."""
        index, true_labels = (None if part is None else part[rows] for part in (self.index, self.true_labels))
        return NoisyBatch(
            self.images[rows], self.labels[rows], index, true_labels, tuple(view[rows] for view in self.views)
        )

    def chunk(self, parts: int) -> list["NoisyBatch"]:
        """Return the ``parts`` equal, consecutive blocks that the batch consists of."""
        size = len(self.images) // parts
        return [self.take(slice(first, first + size)) for first in range(0, parts * size, size)]

    def with_images(self, images: Tensor) -> "NoisyBatch":
        """Return the batch with other images of its samples, (k B, 3, H, W): k views of each, one after another."""
        copies = len(images) // len(self.images)
        index, true_labels = (None if part is None else part.repeat(copies) for part in (self.index, self.true_labels))
        return NoisyBatch(images, self.labels.repeat(copies), index, true_labels)


class EpochPlan(NamedTuple):
    """What a method is told when it chooses the samples of an epoch.

    Attributes:
        epoch: counted from 0.
        steps: S, steps of the epoch in each process; the same in every epoch of a run.
        batch_size: samples per step and process, as the data module has it.
        num_samples: N, size of the training set.
        rank: of this process.
        world_size: number of processes.
        pool: gives the positions (M,) that network 0 or 1 draws from in this epoch, the same in all processes.
    """

    epoch: int
    steps: int
    batch_size: int
    num_samples: int
    rank: int
    world_size: int
    pool: Callable[[int], Tensor]


def _form(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch)) or 'no keys'}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"
