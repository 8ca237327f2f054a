"""Weights from checkpoints that others wrote: usual wrappings and prefixes are seen through, and what matched is listed."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "load_weights"]

HEADS = ("fc.", "head.", "classifier.", "linear.", "projection.", "projector.", "head_fc.")


class LoadReport(NamedTuple):
    """What became of the network's tensors, by name, and what the file holds beside them."""

    matched: list[str]
    """Of the network: found, and loaded."""
    missing: list[str]
    """Of the network without its classifier: not found."""
    unexpected: list[str]
    """Of the file: not used."""
    classifier: list[str]
    """Of the network's classifier: never loaded, as they were before, so random in a new network."""


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load the backbone of a network from a file; its classifier stays as it is.

    The file is a state dict, or a checkpoint that holds one under ``state_dict``, ``model``, ``encoder`` or ``network``.
    Leading parts of the names (``module.``, ``encoder.``, ``network.`` and the like) are taken off, those that make the most
    names and shapes fit. It is opened without unpickling code.

    Args:
        network: whose backbone is filled; mean and standard deviation of a normalising network are not touched.
        path: the file.

    Returns:
        What was found and what was not.

    Raises:
        ValueError: if the file is missing, cannot be opened safely, holds no weights, or less than half of the backbone fits.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of pre-trained weights, got {str(path)!r}, which is not there")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a file of tensors and plain Python in {str(path)!r}, which cannot be opened as one ({reason}); if you "
            "trust it, load it yourself and save its state dict with torch.save"
        ) from error
    weights = _state_dict(held)
    held_by = {name: part for name, part in network.state_dict().items() if isinstance(part, Tensor)}
    own = {name: part for name, part in held_by.items() if not _is_head(name) and name not in ("mean", "std")}
    fitting = max(
        (_fit(weights, own, prefix, inner) for prefix in _prefixes(weights) for inner in _prefixes(own)), key=len
    )
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if not fitting or len(missing) >= len(fitting):
        held_names = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(
            f"expected weights for {type(network).__name__} in {str(path)!r}, but {len(fitting)} of {len(own)} tensors fit in "
            f"name and shape (the file begins with {held_names}; the network with {', '.join(list(own)[:3])}); give the "
            "network that was pre-trained, of the same width"
        )
    network.load_state_dict({name: weights[key] for name, key in fitting.items()}, strict=False)
    used = set(fitting.values())
    unexpected = [key for key in weights if key not in used]
    return LoadReport(list(fitting), missing, unexpected, [name for name in held_by if _is_head(name)])


def _state_dict(held: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "encoder", "network"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping):
        return {}
    return {str(name): tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def _is_head(name: str) -> bool:
    return any(f".{name}".find(f".{head}") >= 0 for head in HEADS)


def _prefixes(names: Mapping[str, Any]) -> list[str]:
    """Every leading part that names have: '', 'module.', 'module.encoder.', ..."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts)))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _fit(weights: dict[str, Tensor], own: dict[str, Tensor], prefix: str, inner: str) -> dict[str, str]:
    """Map names of ``own`` that begin with ``inner`` to names of ``weights`` that begin with ``prefix``, where shapes agree."""
    pairs = {name: prefix + name.removeprefix(inner) for name in own if name.startswith(inner)}
    return {name: key for name, key in pairs.items() if key in weights and weights[key].shape == own[name].shape}
