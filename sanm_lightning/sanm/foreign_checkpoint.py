"""Add SANM to a module and its optimizers, with checkpoints that are those of the module without SANM."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = [
    "add_hidden",
    "add_parameters",
    "add_to_optimizer_states",
    "forgive",
    "split_from_optimizer_states",
    "split_from_state_dict",
]


def split_from_state_dict(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove all keys with a prefix from a state dict, and return them without the prefix."""
    return {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}


def forgive(prefix: str, module: nn.Module, keys: Any) -> None:
    """Allow keys with a prefix to be missing in a state dict, also in copies of the module, such as averaged ones.

    A hook of ``register_load_state_dict_post_hook``.
    """
    keys.missing_keys[:] = [key for key in keys.missing_keys if f".{prefix}" not in f".{key}"]


def add_hidden(module: nn.Module, name: str, part: nn.Module) -> list[Callable[[], Any]]:
    """Add a submodule, for device moves and DDP, that is excluded from the state dict; return functions that undo it."""

    def hide(module: nn.Module, state: dict[str, Any], at: str, metadata: Any) -> None:
        split_from_state_dict(state, f"{at}{name}.")

    module.add_module(name, part)
    return [
        lambda: module._modules.pop(name),
        module.register_state_dict_post_hook(hide).remove,
        module.register_load_state_dict_post_hook(functools.partial(forgive, f"{name}.")).remove,
    ]


def add_parameters(optimizers: Sequence[Optimizer], part: nn.Module, name: str) -> None:
    """Add the parameters of a part that no optimizer has to the first group of the first optimizer.

    A new group would break schedulers that depend on the number of groups.
    """
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in part.parameters() if id(p) not in known]
    if missing and optimizers:
        group = optimizers[0].param_groups[0]
        group["params"].extend(missing)
        if "param_names" in group:
            group["param_names"].extend(f"{name}.{place}" for place in range(len(missing)))


def split_from_optimizer_states(
    states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer], part: nn.Module
) -> list[list[Any]]:
    """Remove the parameters of a part of a module from the state dicts of optimizers, in place.

    Args:
        states: state dict of each optimizer.
        optimizers: the optimizers.
        part: module whose parameters are removed.

    Returns:
        For each optimizer, the states of the removed parameters in their order; None without state.
    """
    return [_split(state, optimizer, part) for state, optimizer in zip(states, optimizers, strict=False)]


def add_to_optimizer_states(
    states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer], part: nn.Module, removed: Sequence[list[Any]]
) -> None:
    """Reverse :func:`split_from_optimizer_states`, in place, for optimizers with the parameters of the part.

    States that contain these parameters, of earlier versions, and states of other modules are left unchanged.

    Args:
        states: state dicts without the parameters of the part.
        optimizers: the current optimizers.
        part: module whose parameters are added.
        removed: their states; empty for a checkpoint without SANM, whose parameters start without a state.
    """
    for place, (state, optimizer) in enumerate(zip(states, optimizers, strict=False)):
        _add(state, optimizer, part, removed[place] if place < len(removed) else [])


def _split(state: dict[str, Any], optimizer: Optimizer, part: nn.Module) -> list[Any]:
    inside = _numbers(optimizer, part)
    if not inside or "param_groups" not in state:
        return []
    kept = {number: place for place, number in enumerate(n for n in range(_size(state)) if n not in inside)}
    removed = [state["state"].get(number) for number in sorted(inside)]
    groups = []
    for saved in state["param_groups"]:
        group = {**saved, "params": [kept[number] for number in saved["params"] if number in kept]}
        if "param_names" in saved:
            names = zip(saved["params"], saved["param_names"], strict=True)
            group["param_names"] = [name for number, name in names if number in kept]
        groups.append(group)
    state["param_groups"] = groups
    state["state"] = {kept[number]: value for number, value in state["state"].items() if number in kept}
    return removed


def _add(state: dict[str, Any], optimizer: Optimizer, part: nn.Module, removed: list[Any]) -> None:
    inside, groups = _numbers(optimizer, part), optimizer.param_groups
    total = sum(len(group["params"]) for group in groups)
    saved_groups = state.get("param_groups", [])
    if not inside or _size(state) != total - len(inside) or len(saved_groups) != len(groups):
        return
    kept = [number for number in range(total) if number not in inside]
    values = {kept[number]: value for number, value in state["state"].items()}
    values.update({n: value for n, value in zip(sorted(inside), removed, strict=False) if value is not None})
    state["state"], state["param_groups"] = values, []
    start = 0
    for saved, current in zip(saved_groups, groups, strict=True):
        stop = start + len(current["params"])
        group = {**saved, "params": list(range(start, stop))}
        if "param_names" in saved:
            group["param_names"] = list(current["param_names"])
        state["param_groups"].append(group)
        start = stop


def _numbers(optimizer: Optimizer, part: nn.Module) -> set[int]:
    """Return the numbers of the parameters of a module in the state dict of an optimizer."""
    own = {id(parameter) for parameter in part.parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {number for number, parameter in enumerate(parameters) if id(parameter) in own}


def _size(state: dict[str, Any]) -> int:
    return sum(len(group["params"]) for group in state.get("param_groups", []))
