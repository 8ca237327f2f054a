"""Broadcast values of rank 0 that DistributedDataParallel does not keep the same in every process."""

from collections.abc import Iterable

import lightning as L
import torch
from torch import Tensor, nn

from sanm_lightning.callbacks.unaveraged import Unaveraged
from sanm_lightning.random_streams import several_processes

__all__ = ["share_buffers", "share_state"]


def share_buffers(module: nn.Module) -> None:
    """Broadcast the batch statistics of rank 0, which a checkpoint contains. A collective operation.

    DistributedDataParallel broadcasts them before each forward, but not after the last one. Without this call, passes
    outside of DDP would use different statistics in each process, and resumed runs would differ from uninterrupted
    ones.
    """
    _share(module.buffers())


def share_state(module: L.LightningModule) -> None:
    """Broadcast the registered state of rank 0, see :class:`Unaveraged`. A collective operation.

    Every process computes it from the same values, but kernels that add in any order, and processors of another kind,
    round differently.
    """
    if not several_processes():
        return
    parts = [part for part in module.modules() if isinstance(part, Unaveraged)]
    for part in parts:  # the values that a method assigns may be expanded views, or on another device
        part.map_state(lambda value: value.to(module.device).contiguous())
    _share(value for part in parts for value in part.registered_state().values())


@torch.no_grad()
def _share(tensors: Iterable[Tensor]) -> None:
    if not several_processes():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for parts in kinds.values():  # one message per dtype
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.broadcast(flat, 0)
        for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))
