"""Prediction of a whole split, sharded over processes, with the same result in every process."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from sanm_lightning.functional import soft_cross_entropy
from sanm_lightning.random_streams import named_generator, process_rank, several_processes

__all__ = ["Quantity", "evaluation_mode", "predict_split"]

Quantity = Literal["logits", "features", "loss", "labels", "predictions"]


def predict_split(
    module: Any,
    split: str,
    quantities: tuple[Quantity, ...],
    network: int | None = 0,
    view: str = "none",
    pool_only: bool = False,
) -> dict[str, Tensor]:
    """Run networks on a whole split, in evaluation mode and without gradient. A collective operation.

    Args:
        module: method whose networks and trainer are used; the trainer must have a data module of this package.
        split: ``"train"`` or ``"val"``.
        quantities: ``"logits"`` (N, C); ``"features"`` (N, D), the input of the classifier; ``"loss"`` (N,), the
            cross-entropy of the given label; ``"labels"`` (N,) int64, the given labels;
            ``"predictions"`` (N,) int64, the predicted classes.
        network: number of the network; None runs all networks and adds a leading dimension, as in (2, N, C).
        view: policy of the view; ``"none"`` is the image without augmentation.
        pool_only: whether the rows are those of the samples of the epoch's pool instead of all samples of ``"train"``, with
            their positions (M,) as ``"index"``.

    Returns:
        The quantities by name, on the module's device, indexed by position in the split; float32, except
        labels and predictions.
    """
    data = module.trainer.datamodule
    networks = module.networks if network is None else [module.networks[network]]
    found: dict[str, Tensor] = {}
    size = data.split_size(split)
    pool = data.pass_pool() if split == "train" and hasattr(data, "pass_pool") else torch.arange(size)
    positions = pool if pool_only else torch.arange(size)
    index = positions.to(module.device)
    loader = data.pass_dataloader(split) if len(positions) == len(pool) else data.pass_dataloader(split, positions)
    generator = named_generator("pass", module.sanm.seed, process_rank(), module.current_epoch)
    with torch.no_grad(), module.trainer.precision_plugin.forward_context(), evaluation_mode(module):
        for item in loader:
            item = move_data_to_device(item, module.device)
            batch = data.pass_batch(item, split, module.device, policy=view, generator=generator)
            batch = module.trainer.precision_plugin.convert_input(batch)
            place = torch.searchsorted(index, batch.index.contiguous()) if pool_only else batch.index
            rows = [_quantities(net, batch.images, batch.labels, quantities) for net in networks]
            for name in quantities:
                value = torch.stack([row[name] for row in rows])
                if name not in found:
                    shape = (len(networks), len(positions), *value.shape[2:])
                    found[name] = torch.zeros(shape, dtype=value.dtype, device=value.device)
                found[name][:, place] = value
    if several_processes():
        for value in found.values():
            torch.distributed.all_reduce(value)
    result = {name: value if network is None and name != "labels" else value[0] for name, value in found.items()}
    return {**result, "index": index} if pool_only else result


def _quantities(network: Any, images: Tensor, labels: Tensor, wanted: tuple[Quantity, ...]) -> dict[str, Tensor]:
    maps = network.forward_features(images)
    found = {"labels": labels}
    if "features" in wanted:
        found["features"] = network.forward_head(maps, pre_logits=True).float()
    if {"logits", "loss", "predictions"} & set(wanted):
        found["logits"] = logits = network.forward_head(maps).float()
        found["loss"] = soft_cross_entropy(logits, nn.functional.one_hot(labels, logits.shape[1]))
        found["predictions"] = logits.argmax(1)
    return found


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Context manager for evaluation mode that restores the mode of every submodule at exit."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
