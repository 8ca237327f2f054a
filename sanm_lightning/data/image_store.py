"""Images of one split: resident on the device as bytes, or streamed by workers."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sanm_lightning.data.rows import ImageDataset, Row, RowRequest, Rows
from sanm_lightning.data.views import select_rows
from sanm_lightning.random_streams import named_generator

__all__ = ["ImageStore"]


class ImageStore:
    """Images of one split.

    Args:
        images: images of the original set, shape (N, C, H, W), uint8, or a data set that decodes them.
        origin: position of each sample of the split in the original set, shape (n,).
        size: H, W of a decoded image in pixels.
        resident_bytes: images that take more bytes are streamed.
        num_workers: number of worker processes that decode images.
        channels: C, number of channels of the images.
    """

    def __init__(
        self,
        images: Tensor | ImageDataset,
        origin: Tensor,
        size: tuple[int, int],
        resident_bytes: int,
        num_workers: int = 0,
        channels: int = 3,
    ) -> None:
        self.num_workers = num_workers
        self.rows = Rows(images, origin, (channels, *size))
        self.resident: Tensor | None = None
        """(n, C, H, W), uint8; None if the images are streamed."""
        self._on_device: dict[torch.device, Tensor] = {}
        if len(origin) * channels * size[0] * size[1] > resident_bytes:
            return
        if isinstance(images, Tensor):
            self.resident = images if len(origin) == len(images) else images[origin]
        else:
            self.resident = torch.empty((len(origin), channels, *size), dtype=torch.uint8)
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
