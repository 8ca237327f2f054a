"""Rows: the samples of one step, decoded by a worker, with the views that workers make."""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from sanm_lightning.data.views import select_rows
from sanm_lightning.random_streams import named_generator, named_seed

__all__ = [
    "ImageDataset",
    "Policy",
    "Row",
    "RowRequest",
    "Rows",
    "SplitItem",
    "seeded",
    "takes_batches",
    "view_generator",
]

Policy = Callable[..., Any]
"""One of two kinds: a policy (images, *, generator) of a batch, uint8 (B, C, H, W) -> uint8 (B, C, h, w), or a
torchvision-style transform of one image, uint8 (C, H, W) -> uint8 (C, h, w)."""


def takes_batches(policy: Policy) -> bool:
    """Return whether a policy takes (uint8 images, generator); others transform one image, as in torchvision."""
    try:
        return "generator" in inspect.signature(policy).parameters
    except (TypeError, ValueError):
        return False


class ImageDataset(Protocol):
    """A map-style data set of decoded images: ``dataset[i]`` is a uint8 tensor of shape (C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class RowRequest(NamedTuple):
    """Request to a worker: the samples of one step, and the policies to apply to them."""

    indices: Tensor
    """(B,), positions in the split; a position may occur several times."""
    policies: tuple[tuple[Policy | None, ...], ...] = ()
    """For each view, one policy per block of the row; None for blocks that are augmented on the device."""
    name: tuple[int, ...] = ()
    """Numbers that identify the random streams of the views: seed, rank, epoch, step."""


class Row(NamedTuple):
    """Response of a worker: each distinct sample decoded once."""

    indices: Tensor
    """(B,), positions in the split."""
    images: Tensor
    """(D, C, H, W), uint8: the distinct samples; D = 0 if the worker made every view."""
    place: Tensor
    """(B,): position of each sample of the row in ``images``; 0 to B - 1 in a row without duplicates."""
    views: list[list[Tensor | None]]
    """For each view, its blocks (b, C, h, w), uint8; None for blocks without a policy."""


class SplitItem(NamedTuple):
    """Output of a loader of a data module, with its origin; the data module converts it to a batch."""

    samples: Tensor | Row
    """Positions in the split, (B,), or a row."""
    split: str
    """Name of the split."""
    stream: tuple[int, ...] = ()
    """Numbers that identify the random streams of the views of a training batch, as in `RowRequest.name`; empty for a
    batch with one view."""

    @property
    def indices(self) -> Tensor:
        """Positions in the split, (B,)."""
        return self.samples if isinstance(self.samples, Tensor) else self.samples.indices


class Rows(Dataset[Row]):
    """Data set of whole rows; runs in the workers."""

    def __init__(self, images: Tensor | ImageDataset, origin: Tensor, shape: tuple[int, int, int]) -> None:
        self.images, self.origin, self.shape = images, origin, shape

    def __getitem__(self, request: Any) -> Row:
        distinct, place = torch.unique(request.indices, return_inverse=True)
        if len(distinct) == len(place):  # in the order of the row, which avoids a gather on the device
            distinct, place = request.indices, torch.arange(len(place))
        decoded = default_collate([self._decoded(row) for row in self.origin[distinct].tolist()])  # into shared memory
        views = [_blocks(number, request, decoded, place) for number in range(len(request.policies))]
        complete = bool(views) and all(None not in blocks for blocks in request.policies)
        return Row(request.indices, decoded.new_zeros((0, *decoded.shape[1:])) if complete else decoded, place, views)

    def _decoded(self, row: int) -> Tensor:
        image = self.images[row]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape != self.shape:
            got = f"{tuple(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"expected uint8 images {self.shape} from the data set, got {got} at {row}; convert them")
        return image


def view_generator(name: tuple[int, ...], number: int) -> torch.Generator:
    """Return the random stream of a view: ``name`` of its :class:`RowRequest`, and its number among the views."""
    return named_generator("augment", *name, number)


def _blocks(number: int, request: RowRequest, decoded: Tensor, place: Tensor) -> list[Tensor | None]:
    """Return the blocks of a view; None for those without a policy."""
    policies = request.policies[number]
    generator = view_generator(request.name, number)
    size = len(place) // len(policies)
    made: list[Tensor | None] = []
    for first, policy in zip(range(0, len(place), size), policies, strict=True):
        rows = place[first : first + size]
        if policy is None:
            made.append(None)
        elif takes_batches(policy):
            made.append(batch_view(policy, select_rows(decoded, rows), generator))
        else:
            views: list[Tensor] = []
            for position, row in enumerate(rows.tolist(), first):
                with seeded(named_seed("transform", *request.name, position, number)):
                    views.append(_checked(_transformed(policy, decoded[row]), policy, views))
            made.append(torch.stack(views))
    return made


def batch_view(policy: Policy, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Apply a policy of batches to images (B, C, H, W), uint8, and check the result.

    Raises:
        ValueError: if the result is not B images, uint8.
    """
    views = policy(images, generator=generator)
    if not isinstance(views, Tensor) or views.dtype != torch.uint8 or views.ndim != 4 or len(views) != len(images):
        what = f"{tuple(views.shape)} of {views.dtype}" if isinstance(views, Tensor) else type(views).__name__
        name = getattr(policy, "__name__", type(policy).__name__)
        raise ValueError(
            f"expected {len(images)} uint8 images (B, C, H, W) from the policy {name}, got {what}; remove conversions to "
            "float and normalization, which the network applies"
        )
    return views


def _transformed(policy: Policy, image: Tensor) -> Any:
    """Apply a transform to one image; its errors name it, because those of transforms of batches do not."""
    try:
        return policy(image)
    except Exception as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"expected a transform of one image, uint8 (C, H, W), got {type(policy).__name__}, which raises "
            f"{type(error).__name__} ({reason}) for {tuple(image.shape)}; use another one, or a policy of batches with a "
            "parameter 'generator'"
        ) from error


def _checked(view: Any, transform: Policy, others: list[Tensor]) -> Tensor:
    if not isinstance(view, Tensor) or view.dtype != torch.uint8 or view.ndim != 3:
        what = f"{tuple(view.shape)} of {view.dtype}" if isinstance(view, Tensor) else type(view).__name__
        raise ValueError(
            f"expected a uint8 tensor (C, H, W) from the transform {type(transform).__name__}, got {what}; remove "
            "conversions to float and normalization, which the network applies"
        )
    if others and view.shape != others[0].shape:
        raise ValueError(
            f"expected views of one size from {type(transform).__name__}, got {tuple(others[0].shape)} and "
            f"{tuple(view.shape)}; add a crop as the last transform"
        )
    return view


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
