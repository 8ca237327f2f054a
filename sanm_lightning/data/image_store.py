"""Images of one split: resident on the device as bytes, or streamed by workers."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sanm_lightning.data.views import select_rows
from sanm_lightning.random_streams import named_generator, named_seed

__all__ = ["ImageDataset", "ImageStore", "Row", "RowRequest", "Transform"]

Transform = Callable[[Tensor], Any]
"""A torchvision-style transform of one image: (3, H, W) uint8 -> (3, h, w) uint8."""


class ImageDataset(Protocol):
    """A map-style data set of decoded images: ``dataset[i]`` is a uint8 tensor of shape (3, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class RowRequest(NamedTuple):
    """Request to a worker: the samples of one step, and the transforms to apply to them."""

    indices: Tensor
    """(B,), positions in the split; a position may occur several times."""
    transforms: tuple[tuple[Transform | None, ...], ...] = ()
    """For each view, one transform per block of the row; None for views augmented on the device."""
    name: tuple[int, ...] = ()
    """Numbers that identify the random streams of the transforms: seed, rank, epoch, step."""


class Row(NamedTuple):
    """Response of a worker: each distinct sample decoded once."""

    indices: Tensor
    """(B,), positions in the split."""
    images: Tensor
    """(D, 3, H, W), uint8: the distinct samples."""
    place: Tensor
    """(B,): position of each sample of the row in ``images``; 0 to B - 1 in a row without duplicates."""
    views: list[Tensor]
    """For each view, (b, 3, h, w), uint8, of the blocks with a transform; empty if there is none."""


class _Rows(Dataset[Row]):
    """Data set of whole rows; runs in the workers."""

    def __init__(self, images: Tensor | ImageDataset, origin: Tensor) -> None:
        self.images, self.origin = images, origin

    def __getitem__(self, request: Any) -> Row:
        distinct, place = torch.unique(request.indices, return_inverse=True)
        if len(distinct) == len(place):  # in the order of the row, which avoids a gather on the device
            distinct, place = request.indices, torch.arange(len(place))
        decoded = default_collate([self.images[row] for row in self.origin[distinct].tolist()])  # into shared memory
        views = [
            self._transformed(number, request, decoded, place) if any(transforms) else decoded.new_zeros(0)
            for number, transforms in enumerate(request.transforms)
        ]
        return Row(request.indices, decoded, place, views)

    @staticmethod
    def _transformed(number: int, request: RowRequest, decoded: Tensor, place: Tensor) -> Tensor:
        transforms = request.transforms[number]
        size, made = len(place) // len(transforms), []
        for position, where in enumerate(place.tolist()):
            transform = transforms[min(position // size, len(transforms) - 1)]
            if transform is None:
                continue
            with seeded(named_seed("transform", *request.name, position, number)):
                view = transform(decoded[where])
            if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.ndim != 3:
                what = f"{tuple(view.shape)} of {view.dtype}" if isinstance(view, Tensor) else type(view).__name__
                raise ValueError(
                    f"expected a uint8 tensor (3, H, W) from the transform {type(transform).__name__}, got {what}; "
                    "remove conversions to float and normalization, which the network applies"
                )
            made.append(view)
        if len({view.shape for view in made}) > 1:
            raise ValueError(
                f"expected views of one size from {type(transform).__name__}, got {tuple(made[0].shape)} and others; "
                "add a crop as the last transform"
            )
        return torch.stack(made)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager that seeds the global streams of torch, numpy and random, and restores them at exit."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class ImageStore:
    """Images of one split.

    Args:
        images: images of the original set, shape (N, 3, H, W), uint8, or a data set that decodes them.
        origin: position of each sample of the split in the original set, shape (n,).
        size: H, W of a decoded image in pixels.
        resident_bytes: images that take more bytes are streamed.
        num_workers: number of worker processes that decode images.
    """

    def __init__(
        self,
        images: Tensor | ImageDataset,
        origin: Tensor,
        size: tuple[int, int],
        resident_bytes: int,
        num_workers: int = 0,
    ) -> None:
        self.num_workers = num_workers
        self.rows = _Rows(images, origin)
        self.resident: Tensor | None = None
        """(n, 3, H, W), uint8; None if the images are streamed."""
        self._on_device: dict[torch.device, Tensor] = {}
        if len(origin) * 3 * size[0] * size[1] > resident_bytes:
            return
        if isinstance(images, Tensor):
            self.resident = images if len(origin) == len(images) else images[origin]
        else:
            self.resident = torch.empty((len(origin), 3, *size), dtype=torch.uint8)
            parts = torch.arange(len(origin)).split(64)
            for index, row in zip(parts, self.decode([RowRequest(part) for part in parts]), strict=True):
                self.resident[index] = row.images

    def decode(self, requests: list[RowRequest], seed: int = 0) -> Iterator[Row]:
        """Iterate over rows in order, decoded by the workers."""
        loader = DataLoader(
            self.rows,
            batch_size=None,
            sampler=cast(Any, requests),  # any sized iterable
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=named_generator("workers", seed),  # otherwise every epoch uses the global stream
        )
        return iter(cast(Any, loader))

    def on_device(self, device: torch.device) -> Tensor | None:
        """Return the resident images on a device, moved once; None if the images are streamed."""
        if self.resident is None:
            return None
        if device not in self._on_device:
            self._on_device[device] = self.resident.to(device)
        return self._on_device[device]

    def look_up(self, index: Tensor) -> Tensor:
        """Return images by position (B,), uint8, on the device of ``index``; streamed images are decoded here."""
        resident = self.on_device(index.device)
        if resident is not None:
            return select_rows(resident, index)
        row = self.rows[RowRequest(index.cpu())]
        return row.images[row.place].to(index.device)

    def free(self) -> None:
        """Free the memory on devices."""
        self._on_device.clear()
