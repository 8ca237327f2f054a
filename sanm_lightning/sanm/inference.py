"""Run a network in the middle of its training, as in evaluation."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["inference_context"]


@contextlib.contextmanager
def inference_context(network: Any, images: Tensor, batch_statistics: bool = False) -> Iterator[None]:
    """Run ``network`` as in evaluation, without gradient, with modes, statistics, streams and caches restored after it.

    Args:
        network: the network that is run.
        images: its input; the device counts.
        batch_statistics: let batch norm use the statistics of this batch, as in training, in place of the running ones.

    The cache is autocast's: a weight cast to bf16 without gradient would be served again to the training forward, and its
    gradient would be lost.
    """
    training = [module for module in network.modules() if module.training] if hasattr(network, "modules") else []
    norms = [m for m in training if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    device = images.device
    flag = object.__setattr__  # a module's own looks for parameters first: a third of a mask's time for a ResNet-18
    for module in training:
        flag(module, "training", False)
    if batch_statistics:
        for norm in norms:  # in training mode but without tracking: the batch's own statistics, and no update
            flag(norm, "training", True)
            flag(norm, "track_running_stats", False)
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
