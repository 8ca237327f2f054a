"""Start a new run from the weights of an earlier one: ``sanm fit --weights FILE``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from sanm_lightning.class_names import real_names
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.methods.ema import EMA
from sanm_lightning.models.checkpoints import load_state, read_weights

__all__ = ["start_from"]


def start_from(module: L.LightningModule, path: str | Path, class_names: Sequence[str] | None = None) -> None:
    """Load the weights of a file into a module that is not trained yet.

    The networks of a method are loaded, also from another method or from a third-party file; a file with one network fills
    both networks of a method with two. Classifiers are loaded if the number and the names of the classes are the same.
    Optimizer, schedule, per-sample state and decoders of SANM start anew, and averaged copies restart from the weights.
    Modules that are not methods of this package require all of their tensors except those of SANM. Tensors that are not
    loaded are logged.

    Args:
        module: module of the new run.
        path: checkpoint, state dict, ``model.safetensors``, or folder written by ``sanm export``.
        class_names: names of the classes of the new run; None if unknown.

    Raises:
        ValueError: if the file cannot be read, or tensors of a network are missing or have another shape.
    """
    path = Path(path)
    first, second, names = _read(path)
    if not isinstance(module, NoisyLabelModule):
        _fill_module(module, first, path)
        return
    same_classes = None in (names, real_names(class_names)) or names == real_names(class_names)
    random: list[str] = []
    for number, network in enumerate(module.networks):
        weights = second if number and second else first
        report = load_state(network, weights, path, allow_missing=False, classifier=same_classes)
        random += [f"{'network2' if number else 'network'}.{name}" for name in report.classifier]
        _compare_statistics(network, weights, path)
    for average in (part for part in module.modules() if isinstance(part, EMA)):
        average.restart()
    both = " into both networks" if len(module.networks) == 2 and not second else ""
    rest = f"; initialized randomly: {', '.join(random)}" if random else ""
    if random and not same_classes:
        rest += " (the classes have other names)"
    rank_zero_info(f"weights of {path} loaded{both}{rest}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str] | None]:
    """Return the tensors of the first and of the second network, if there is one, and the class names."""
    if path.is_dir():
        folder = path / "network" if (path / "network").is_dir() else path
        other = path / "network2" / "model.safetensors"
        second = read_weights(other) if other.is_file() else {}
        return read_weights(folder / "model.safetensors"), second, _exported_names(folder / "config.json")
    weights = read_weights(path)
    names = None if path.suffix == ".safetensors" else _saved_names(path)
    if path.suffix == ".safetensors":
        names = _exported_names(path.with_name("config.json"))
    second = {name: part for name, part in weights.items() if name.startswith("network2.")}
    return {name: part for name, part in weights.items() if name not in second}, second, names


def _saved_names(path: Path) -> list[str] | None:
    held = torch.load(path, map_location="cpu", weights_only=True)
    return real_names(held.get("class_names")) if isinstance(held, Mapping) else None


def _exported_names(config: Path) -> list[str] | None:
    return real_names(json.loads(config.read_text(encoding="utf-8")).get("label_names")) if config.is_file() else None


def _fill_module(module: L.LightningModule, weights: Mapping[str, Tensor], path: Path) -> None:
    own = {name: part for name, part in module.state_dict().items() if isinstance(part, Tensor)}
    fitting = {
        name: weights[name] for name, part in own.items() if name in weights and weights[name].shape == part.shape
    }
    missing = [name for name in own if name not in fitting and not name.startswith("sanm")]
    if missing or not fitting:
        raise ValueError(
            f"expected all {len(own)} tensors of {type(module).__name__} in {str(path)!r}, got {len(fitting)} that match in "
            f"name and shape (not in the file: {', '.join(missing[:3])}); use a checkpoint of this module"
        )
    module.load_state_dict(fitting, strict=False)
    rank_zero_info(f"weights of {path} loaded: {len(fitting)} tensors")


def _compare_statistics(network: Any, weights: Mapping[str, Tensor], path: Path) -> None:
    for name in ("mean", "std"):
        held = next((weights[key] for key in (f"network.{name}", f"network2.{name}", name) if key in weights), None)
        own: Tensor | None = getattr(network, name, None)
        if held is not None and own is not None and not torch.allclose(held.flatten(), own.flatten().cpu(), atol=1e-4):
            rank_zero_warn(
                f"expected the {name} of the weights in {str(path)!r}, {_rounded(held)}, got {_rounded(own)}; set "
                f"--model.{name} to normalize the images as in the earlier run"
            )


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values.flatten()]
