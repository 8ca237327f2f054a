"""Load weights from third-party checkpoints, with common containers and name prefixes."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "load_weights"]

HEADS = ("fc.", "head.", "classifier.", "linear.", "projection.", "projector.", "head_fc.")


class LoadReport(NamedTuple):
    """Names of the tensors of the network and of the file, by result of the loading."""

    matched: list[str]
    """Tensors of the network that were loaded."""
    missing: list[str]
    """Tensors of the network, without its classifier, that are not in the file."""
    unexpected: list[str]
    """Tensors of the file that were not used."""
    classifier: list[str]
    """Tensors of the classifier of the network, which are not loaded and keep their values."""


def load_weights(network: nn.Module, path: str | Path) -> LoadReport:
    """Load the backbone of a network from a file; the classifier is unchanged.

    The file is a state dict, or a checkpoint with a state dict under ``state_dict``, ``model``, ``encoder`` or
    ``network``. Name prefixes (``module.``, ``encoder.``, ``network.`` and others) are removed such that most names and
    shapes match. The file is read without executing pickled code.

    Args:
        network: network to load into; mean and standard deviation of a normalizing network are unchanged.
        path: path of the file.

    Returns:
        Names of matched, missing and unexpected tensors.

    Raises:
        ValueError: if the file is missing, cannot be opened safely, contains no weights, or matches less than half of
            the backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"expected a file of pre-trained weights, got {str(path)!r}, which does not exist; check the path"
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a file of tensors and built-in types, got {str(path)!r}, which cannot be loaded as such "
            f"({reason}); if the file is trusted, load it and save its state dict with torch.save"
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
            f"expected weights of {type(network).__name__} in {str(path)!r}, got {len(fitting)} of {len(own)} tensors "
            f"that match in name and shape (first names in the file: {held_names}; in the network: "
            f"{', '.join(list(own)[:3])}); use the network and the width of the pre-training"
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
    """Return all prefixes of the names: '', 'module.', 'module.encoder.', ..."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) + "." for depth in range(1, min(4, len(parts)))}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _fit(weights: dict[str, Tensor], own: dict[str, Tensor], prefix: str, inner: str) -> dict[str, str]:
    """Map names of ``own`` with prefix ``inner`` to names of ``weights`` with ``prefix`` and the same shape."""
    pairs = {name: prefix + name.removeprefix(inner) for name in own if name.startswith(inner)}
    return {name: key for name, key in pairs.items() if key in weights and weights[key].shape == own[name].shape}
