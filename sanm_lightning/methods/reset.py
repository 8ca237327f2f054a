"""Reinitialize the networks of a method during training."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sanm_lightning.callbacks.stages import reset_parameters
from sanm_lightning.compat import restart_average
from sanm_lightning.methods.ema import EMA

__all__ = ["check_reset", "copy_reinitialized", "reinitialize", "reset_networks"]


@torch.no_grad()
def reinitialize(network: nn.Module) -> list[str]:
    """Reinitialize a network in place by the methods ``reset_parameters`` of its modules; frozen parameters keep their values.

    Returns:
        The names of the trainable parameters that no such method sets, and which keep their values. All are NaN during the
        calls; those that are NaN afterwards were not set.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    values = {name: parameter.clone() for name, parameter in trained.items()}
    rest = [*(part for part in network.parameters() if not part.requires_grad), *network.buffers()]
    before = [part.clone() for part in rest]
    for parameter in trained.values():
        parameter.fill_(torch.nan)
    network.apply(reset_parameters)
    kept = [name for name, parameter in trained.items() if bool(parameter.isnan().any())]
    for name in kept:
        trained[name].copy_(values[name])
    for part, old in zip(rest, before, strict=True):
        if isinstance(part, nn.Parameter) or bool(part.isnan().any()):  # spectral norm iterates when a weight is read
            part.copy_(old)
    return kept


def copy_reinitialized(network: nn.Module, method: str) -> Any:
    """Return a reinitialized copy of a network, for the second network of a method.

    It warns of parameters that the copy shares with the network, unless they are constant, as for class tokens of 0.
    """
    twin = copy.deepcopy(network)
    kept = set(reinitialize(twin))
    shared = [
        name for name, value in twin.named_parameters() if name in kept and bool((value != value.flatten()[0]).any())
    ]
    if shared:
        rank_zero_warn(_sentence(network, shared, f"{method}, whose second network has other initial weights"))
    return twin


@torch.no_grad()
def check_reset(module: Any, create: Callable[[], Any] | None, head_only: bool) -> None:
    """Check that :func:`reset_networks` can reinitialize the networks, which are unchanged.

    Raises:
        ValueError: if a parameter of a network given as a module, or of a classifier, cannot be reinitialized.
    """
    if create is not None and not head_only:
        return
    for network in module.networks:
        part = network.get_classifier() if head_only else network
        values = [*part.parameters(), *part.buffers()]
        before = [value.clone() for value in values]
        with torch.random.fork_rng([module.device] if module.device.type == "cuda" else []):
            kept = reinitialize(part)
        for value, old in zip(values, before, strict=True):
            value.copy_(old)
        _require_all_set(module, part, kept)


@torch.no_grad()
def reset_networks(module: Any, create: Callable[[], Any] | None, head_only: bool) -> list[nn.Parameter]:
    """Reinitialize the networks of ``module`` in place, or their classifiers only.

    Decoders and averaged copies are reset with their network; the averages, also those of Lightning's callbacks, restart from
    the new weights.

    Args:
        module: method with ``networks`` and ``sanms``.
        create: function that creates a new network; None calls ``reset_parameters`` of every submodule that has it.
        head_only: whether to reset the classifiers only.

    Returns:
        The reinitialized parameters, whose optimizer state should be deleted.

    Raises:
        ValueError: if a parameter cannot be reinitialized, see :func:`check_reset`.
    """
    drawn: list[nn.Parameter] = []
    for network, sanm in zip(module.networks, module.sanms, strict=True):
        parts: list[nn.Module] = [network.get_classifier()] if head_only else [network]
        if head_only or create is None:
            _require_all_set(module, parts[0], reinitialize(parts[0]))
        else:
            network.load_state_dict(create().state_dict())
        if not head_only and sanm.decoder is not None:
            sanm.decoder.apply(reset_parameters)
            parts.append(sanm.decoder)
        drawn += [parameter for part in parts for parameter in part.parameters()]
    if not head_only:
        for average in (part for part in module.modules() if isinstance(part, EMA)):
            average.restart()
    for callback in [] if module._trainer is None else module._trainer.callbacks:
        restart_average(callback)
    return drawn


def _require_all_set(module: Any, part: nn.Module, kept: list[str]) -> None:
    if kept:
        raise ValueError(_sentence(part, kept, f"{type(module).__name__}, which reinitializes it during training"))


def _sentence(network: nn.Module, kept: list[str], owner: str) -> str:
    names = ", ".join(name.removeprefix("network.") for name in kept[:3])
    more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
    return (
        f"expected a network whose modules reinitialize all parameters by reset_parameters for {owner}, got "
        f"{type(getattr(network, 'network', network)).__name__}, which keeps {names}{more}; pass the name of a timm model, or "
        "define reset_parameters in the modules of these parameters"
    )
