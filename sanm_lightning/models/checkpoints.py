"""Load weights from third-party checkpoints, with common containers and name prefixes."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sanm_lightning.models.released_names import released_forms

__all__ = ["LoadReport", "load_state", "load_weights", "read_weights"]

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
    """Tensors of the classifier of the network that were not loaded and keep their values."""


def load_weights(
    network: nn.Module, path: str | Path, allow_missing: bool = False, classifier: bool = False
) -> LoadReport:
    """Load a network from a file, by default without its classifier.

    The file is a state dict, a checkpoint with a state dict under ``state_dict``, ``model``, ``encoder`` or ``network``,
    or a safetensors file. Name prefixes (``module.``, ``encoder.``, ``network.`` and others) are removed such that most
    names and shapes match; names of released codes are converted, see :func:`released_forms`. The file is read without
    executing pickled code.

    Args:
        network: network to load into; mean and standard deviation of a normalizing network are unchanged.
        path: path of the file.
        allow_missing: whether tensors of the network may be missing from the file; they are listed in the report.
        classifier: whether to load the classifier too, if its shape is the same.

    Returns:
        Names of matched, missing and unexpected tensors, and those of a classifier that is not loaded.

    Raises:
        ValueError: if the file is missing, cannot be opened safely, contains no weights, does not contain all tensors of
            the network (with ``allow_missing``, at least half), or belongs to another form of the network.
    """
    return load_state(network, read_weights(path), path, allow_missing, classifier)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name, see :func:`load_weights`.

    Raises:
        ValueError: if the file is missing, or cannot be opened safely.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"expected a file of pre-trained weights, got {str(path)!r}, which does not exist; check the path"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"expected a file of tensors and built-in types, got {str(path)!r}, which cannot be loaded as such "
            f"({reason}); if the file is trusted, load it and save its state dict with torch.save"
        ) from error
    return _state_dict(held)


def load_state(
    network: nn.Module, weights: Mapping[str, Tensor], path: str | Path, allow_missing: bool, classifier: bool
) -> LoadReport:
    """Load a network from the tensors of a file, see :func:`load_weights`."""
    held_by = {name: part for name, part in network.state_dict().items() if isinstance(part, Tensor)}
    heads = _classifier_names(network, held_by)
    own = {
        name: part
        for name, part in held_by.items()
        if name not in ("mean", "std") and (classifier or name not in heads)
    }
    fitting = _best_fit(weights, own)
    missing = [name for name in own if name not in (*fitting, *heads) and not name.endswith("num_batches_tracked")]
    if not fitting or len(missing) >= len(fitting) or (missing and not allow_missing):
        held_names = ", ".join(list(weights)[:3]) or "none"
        raise ValueError(
            f"expected weights of {type(network).__name__} in {str(path)!r}, got {len(fitting)} of {len(own)} tensors "
            f"that match in name and shape (first names in the file: {held_names}; in the network, not in the file: "
            f"{', '.join(missing[:3])}); use the network and the width of the pre-training"
        )
    _require_same_form(network, fitting, path)
    network.load_state_dict({name: weights[key] for name, key in fitting.items()}, strict=False)
    used = set(fitting.values())
    unexpected = [key for key in weights if key not in used]
    return LoadReport(list(fitting), missing, unexpected, [name for name in heads if name not in fitting])


def _require_same_form(network: nn.Module, fitting: Mapping[str, str], path: str | Path) -> None:
    released = any(".bn1." in key and ".norm1." in name for name, key in fitting.items())
    if released and any(getattr(part, "activated_shortcut", True) is False for part in network.modules()):
        raise ValueError(
            f"expected the network of the released code for the weights in {str(path)!r}, got one whose identity shortcuts "
            "pass the input without batch norm and ReLU; use preact_resnet18_dividemix"
        )


def _classifier_names(network: Any, names: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of the classifier: by timm's interface, or by the usual names."""
    if not hasattr(network, "get_classifier"):
        return [name for name in names if _is_head(name)]
    found = network.get_classifier()
    parts = found if isinstance(found, (tuple, list)) else [found]
    prefixes = tuple(f"{name}." for name, part in network.named_modules() if any(part is one for one in parts))
    return [name for name in names if name.startswith(prefixes)] if prefixes else []


def _best_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names of the network to those of the file, such that most names and shapes match."""
    best: dict[str, str] = {}
    for form in released_forms(weights):
        converted = {name: weights[key] for name, key in form.items()}
        for prefix in _prefixes(converted):
            for inner in _prefixes(own):
                found = _fit(converted, own, prefix, inner)
                if len(found) > len(best):
                    best = {name: form[key] for name, key in found.items()}
    return best


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


def _fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str, inner: str) -> dict[str, str]:
    """Map names of ``own`` with prefix ``inner`` to names of ``weights`` with ``prefix`` and the same shape."""
    pairs = {name: prefix + name.removeprefix(inner) for name in own if name.startswith(inner)}
    return {name: key for name, key in pairs.items() if key in weights and weights[key].shape == own[name].shape}
