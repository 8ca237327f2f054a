"""Run a network in evaluation mode during training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.models import Normalized

__all__ = ["infer", "inference_context", "input_channels", "is_out_of_memory"]


def input_channels(network: Any) -> int:
    """Return the number of image channels of a network.

    It is that of its normalization, or else of its first convolution with at most 4; 3 without both.
    """
    if isinstance(network, Normalized):
        return len(network.mean)
    modules = network.modules() if isinstance(network, nn.Module) else []
    convolutions = (module for module in modules if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convolutions if conv.in_channels <= 4), 3)


@contextlib.contextmanager
def inference_context(
    network: Any, images: Tensor, batch_statistics: bool = False, update_statistics: bool = False
) -> Iterator[None]:
    """Context manager for a forward pass in evaluation mode, without gradient; modes and random streams are restored.

    Args:
        network: network to run.
        images: input of the network; only the device is used.
        batch_statistics: whether batch norm uses batch statistics, as in training, instead of running statistics.
        update_statistics: whether they update the running statistics, as in training; requires ``batch_statistics``.

    The cache of autocast is disabled: a weight that is cast to bf16 without gradient would be reused in the training
    forward pass, and its gradient would be lost.
    """
    training = [module for module in network.modules() if module.training] if hasattr(network, "modules") else []
    norms = [m for m in training if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    device = images.device
    flag = object.__setattr__  # nn.Module.__setattr__ takes a third of the masking time for a ResNet-18
    for module in training:
        flag(module, "training", False)
    if batch_statistics:
        for norm in norms:  # training mode; without tracking, there is no update
            flag(norm, "training", True)
            flag(norm, "track_running_stats", update_statistics)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(
                device.type,
                dtype=torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            ),
        ):
            yield
    finally:
        for module in training:
            flag(module, "training", True)
        for norm in norms:
            flag(norm, "track_running_stats", True)


def infer(
    network: Any, images: Tensor, batch_statistics: bool = False, update_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the feature maps (B, D, h, w) and the logits (B, C), float32, of images in an :func:`inference_context`.

    Args:
        network: network with timm's interface.
        images: shape (B, 3, H, W).
        batch_statistics: as for :func:`inference_context`.
        update_statistics: as for :func:`inference_context`.
    """
    with inference_context(network, images, batch_statistics, update_statistics):
        maps = network.forward_features(images)
        return maps, network.forward_head(maps).float()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the CPU or of a device is exhausted."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
