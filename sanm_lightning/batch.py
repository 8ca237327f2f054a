"""Types that the data module and the methods exchange."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["EpochPlan", "NoisyBatch", "View"]

View = str | tuple[str, ...]
"""One policy for all samples of a batch, or one policy for each of several equal, consecutive blocks of a batch."""

_KEYS = {
    "images": ("images", "image", "x", "inputs", "input", "pixel_values"),
    "labels": ("labels", "label", "y", "targets", "target"),
    "index": ("index",),
    "true_labels": ("true_labels",),
}


class NoisyBatch(NamedTuple):
    """Batch of images with possibly wrong labels.

    A named tuple: ``images, labels, *_ = batch`` and ``batch[0]`` work as for the usual ``(x, y)`` pair.

    Attributes:
        images: images, shape (B, 3, H, W), floating, in [0, 1].
        labels: given, possibly wrong class indices, shape (B,), int64.
        index: position of each sample in the training set, shape (B,), int64; None if unknown.
        true_labels: true class indices, shape (B,), int64; None if unknown. Used by metrics and by oracle label quality
            only.
        views: the views declared by the method, in order, each of the shape of ``images``; ``images`` is the first.
            Empty in batches of third-party loaders.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index
    true_labels: Tensor | None = None
    views: tuple[Tensor, ...] = ()

    @classmethod
    def from_any(cls, batch: Any, need_labels: bool = True) -> "NoisyBatch":
        """Convert a batch of any common form.

        Args:
            batch: a :class:`NoisyBatch`; a tuple or list ``(images, labels, ...)``, whose further elements are ignored;
                ``(images,)`` or a tensor of images; a mapping, a named tuple or an object with names such as
                ``images``, ``image``, ``x`` and ``labels``, ``label``, ``y``, and optionally ``index`` and
                ``true_labels``.
            need_labels: whether labels are required; without labels, ``labels`` is an empty tensor.

        Returns:
            The batch as a :class:`NoisyBatch`. Images in uint8 are converted to floating images in [0, 1], and labels
            and positions of any integer dtype to int64.

        Raises:
            ValueError: if the batch has no images, or no labels although they are required.
        """
        if isinstance(batch, NoisyBatch):
            index = None if batch.index is None else batch.index.long()
            return batch._replace(images=_floating(batch.images), labels=_indices(batch.labels), index=index)
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
                f"expected a batch NoisyBatch, (images, labels, ...) or a mapping with 'images', got {_form(batch)}; "
                "return tensors from the data set"
            )
        if not isinstance(labels, Tensor):
            if need_labels:
                raise ValueError(
                    f"expected a batch with labels, got {_form(batch)}; return NoisyBatch or (images, labels) from the "
                    "loader"
                )
            labels = torch.zeros(0, dtype=torch.int64, device=images.device)
        index = parts.get("index")
        index = None if index is None else index.long()
        return cls(_floating(images), _indices(labels), index, parts.get("true_labels"))

    def take(self, rows: Any) -> "NoisyBatch":
        """Select samples of the batch by a slice or by positions (K,)."""
        index, true_labels = (None if part is None else part[rows] for part in (self.index, self.true_labels))
        return NoisyBatch(
            self.images[rows], self.labels[rows], index, true_labels, tuple(view[rows] for view in self.views)
        )

    def chunk(self, parts: int) -> list["NoisyBatch"]:
        """Split the batch into ``parts`` equal, consecutive blocks."""
        size = len(self.images) // parts
        return [self.take(slice(first, first + size)) for first in range(0, parts * size, size)]

    def with_images(self, images: Tensor) -> "NoisyBatch":
        """Replace the images by ``images``, (k B, 3, H, W): k views of the batch, one after another."""
        copies = len(images) // len(self.images)
        index, true_labels = (None if part is None else part.repeat(copies) for part in (self.index, self.true_labels))
        return NoisyBatch(images, self.labels.repeat(copies), index, true_labels)


class EpochPlan(NamedTuple):
    """Arguments for the selection of the samples of an epoch.

    Attributes:
        epoch: epoch number, from 0.
        steps: S, steps of the epoch in each process; the same in every epoch of a run.
        batch_size: samples per step and process, as configured in the data module.
        num_samples: N, size of the training set.
        rank: rank of this process.
        world_size: number of processes.
        pool: returns the positions (M,) that network 0 or 1 samples from in this epoch, the same in all processes.
        fixed_order: whether every epoch is sampled with the random streams of epoch 0, as required by ``overfit_batches``.
    """

    epoch: int
    steps: int
    batch_size: int
    num_samples: int
    rank: int
    world_size: int
    pool: Callable[[int], Tensor]
    fixed_order: bool = False

    @property
    def draw_epoch(self) -> int:
        """Epoch number of the random streams that sample: ``epoch``, or 0 with ``fixed_order``."""
        return 0 if self.fixed_order else self.epoch

    def step_size(self, pool: Tensor) -> int:
        """Return the samples per step and process from a pool (M,): ``batch_size``, or its share of a smaller pool."""
        return min(self.batch_size, -(-len(pool) // self.world_size))


def _floating(images: Tensor) -> Tensor:
    """Convert uint8 to [0, 1], in the default dtype, which the trainer sets to its precision."""
    return images.to(torch.get_default_dtype()) / 255 if images.dtype == torch.uint8 else images


def _indices(labels: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else labels.long()


def _form(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch)) or 'no keys'}"
    if isinstance(batch, (list, tuple)):
        return f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"
