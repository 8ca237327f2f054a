"""``sanm export``: export the weights or the whole predictor of a trained method."""

import contextlib
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.data.decode import MODES
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.models import Normalized
from sanm_lightning.predictor import Predictor, TrainedMethod, load_method
from sanm_lightning.safe_files import require_folder

__all__ = ["FORMATS", "export", "main"]

FORMATS = ("safetensors", "torch", "onnx")
INPUTS = ("float32", "uint8")
NOT_OF_THE_NETWORK = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path")
"""Options of timm's factory for initial weights."""


def export(
    ckpt_path: str,
    out: str,
    format: list[str] | None = None,
    input_dtype: str = "float32",
    method: type[NoisyLabelModule] | None = None,
) -> int:
    """Export a trained method to a new folder.

    ``safetensors`` writes the weights of each network to ``network/`` and ``network2/``. For architectures of timm, keys are
    those of timm, and ``timm.create_model("local-dir:FOLDER/network", pretrained=True)`` loads the folder (timm 1.0.16 or
    newer). ``torch`` and ``onnx`` write the whole predictor, including normalization and ensemble: ``predictor.pt2`` for
    ``torch.export.load``, ``predictor.onnx`` for ONNX runtimes, and ``predictor.json``, which describes inputs and outputs.

    Args:
        ckpt_path: checkpoint of a method of this package.
        out: output folder, which must be new or empty.
        format: one or more of ``safetensors``, ``torch``, ``onnx``. Default: ``safetensors``.
        input_dtype: type of the input images of a whole predictor: ``float32`` in [0, 1], or ``uint8`` in [0, 255].
        method: class of a custom method, such as ``my_module.MyMethod``, for its checkpoints.

    Returns:
        Exit status, 0.

    Raises:
        ValueError: if the file is not a checkpoint of a method, a format is unknown, its packages are missing, or the
            network cannot be traced.
        OSError: if a file is missing, or ``out`` contains files or cannot be written.
    """
    formats = list(dict.fromkeys(format or ["safetensors"]))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or input_dtype not in INPUTS:
        raise ValueError(
            f"expected formats among {', '.join(FORMATS)} and an input_dtype among {', '.join(INPUTS)}, got "
            f"{', '.join(formats)} and {input_dtype}; choose from these"
        )
    if "onnx" in formats:
        _require_onnx()
    _require_new_folder(Path(out))
    trained = load_method(ckpt_path, method)
    predictor = Predictor(trained.module) if formats != ["safetensors"] else None
    written = []
    with _new_folder(Path(out)) as folder:
        if "safetensors" in formats:
            for name, network in zip(("network", "network2"), trained.module.standalone_networks(), strict=False):
                write_network(folder / name, network, trained)
                written.append(f"{name}/model.safetensors")
        if predictor is not None:
            program = _traced(predictor, input_dtype, trained.channels)
            (folder / "predictor.json").write_text(_text(_description(trained, input_dtype)), encoding="utf-8")
            if "torch" in formats:
                torch.export.save(program, folder / "predictor.pt2")
                written.append("predictor.pt2")
            if "onnx" in formats:
                _write_onnx(program, folder / "predictor.onnx")
                written.append("predictor.onnx")
    print(f"{type(trained.module).__name__} with {len(trained.class_names)} classes: {', '.join(written)} in {out}")
    return 0


# Weights ---------------------------------------------------------------------------------------------------------------


def write_network(folder: Path, network: Normalized, trained: TrainedMethod) -> None:
    """Write ``model.safetensors`` and ``config.json`` of one network, without an untrained classifier.

    Args:
        folder: output folder, which is created.
        network: network with normalization, whose untrained classifier is removed.
        trained: method of the network.
    """
    if not trained.module.trains_classifier:
        network.network.reset_classifier(0)
    name = _architecture(trained)
    of_timm = timm.is_model(name) and timm.model_entrypoint(name).__module__.split(".")[0] == "timm"
    state = (network.network if of_timm else network).state_dict()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        save({key: part.clone().contiguous() for key, part in state.items()}, metadata={"format": "pt"})
    )
    (folder / "config.json").write_text(_text(_config(network, trained, of_timm)), encoding="utf-8")


def _architecture(trained: TrainedMethod) -> str:
    return str(trained.module.hparams["network"]).split(".")[0]


def _config(network: Normalized, trained: TrainedMethod, of_timm: bool) -> dict[str, Any]:
    """Return the configuration of a network in timm's hub format."""
    settings = trained.module.hparams
    options = {
        key: value for key, value in (settings.get("network_args") or {}).items() if key not in NOT_OF_THE_NETWORK
    }
    height, width = trained.module.image_size
    own = getattr(network.network, "pretrained_cfg", None) or {}
    kept = ("first_conv", "classifier", "fixed_input_size")
    classes = len(trained.class_names) if trained.module.trains_classifier else 0
    config: dict[str, Any] = {
        "architecture": _architecture(trained),
        "num_classes": classes,
        "num_features": network.num_features,
        **({"label_names": trained.class_names} if classes else {}),
        **({"model_args": options} if options else {}),
        "pretrained_cfg": {
            **{key: own[key] for key in kept if own.get(key) is not None},
            "num_classes": classes,
            "input_size": [trained.channels, height, width],
            "mean": network.mean.flatten().tolist(),
            "std": network.std.flatten().tolist(),
            "interpolation": "bilinear",
            "crop_pct": max(height, width) / trained.decode_size,
            "crop_mode": "squash" if trained.resize == "stretch" else "center",
            "custom_load": False,
        },
        "library": "timm" if of_timm else "sanm_lightning",
        "method": type(trained.module).__name__,
    }
    if not of_timm:
        config["load"] = (
            "sanm_lightning.models.create_network(architecture, num_classes, **model_args).load_state_dict("
            "safetensors.torch.load_file('model.safetensors')); it takes images in [0, 1], mean and std are among its weights"
        )
    return config


# The whole predictor ---------------------------------------------------------------------------------------------------


def _traced(predictor: Predictor, input_dtype: str, channels: int) -> Any:
    images = torch.rand(2, channels, *predictor.image_size)
    if input_dtype == "uint8":
        images = (images * 255).to(torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad():
            return torch.export.export(predictor, (images,), dynamic_shapes=shapes)
    except Exception as error:  # tracing raises various exceptions
        raise ValueError(
            f"expected a network that torch.export can trace with any batch size, got {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}; export it as safetensors"
        ) from error


def _write_onnx(program: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["probabilities"], verbose=False
        )
        assert made is not None
        made.save(path)


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"expected the package {name} for the format onnx, got none; install the extra 'onnx'"
            ) from error


def _description(trained: TrainedMethod, input_dtype: str) -> dict[str, Any]:
    height, width = trained.module.image_size
    return {
        "method": type(trained.module).__name__,
        "class_names": trained.class_names,
        "input": {
            "name": "images",
            "shape": ["batch", trained.channels, height, width],
            "dtype": input_dtype,
            "range": [0, 255] if input_dtype == "uint8" else [0, 1],
            "channels": MODES[trained.channels],
            "resize_both_sides" if trained.resize == "stretch" else "resize_short_side": trained.decode_size,
            "center_crop": [height, width],
        },
        "output": {"name": "probabilities", "shape": ["batch", len(trained.class_names)], "dtype": "float32"},
    }


# Files -----------------------------------------------------------------------------------------------------------------


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _require_new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a folder with files" if folder.is_dir() else "a file"
        raise FileExistsError(f"expected a new folder in {str(folder)!r}, got {what}; use another --out")
    if not folder.name:
        raise ValueError(f"expected the name of a new folder, got {str(folder)!r}; use another --out")
    require_folder(folder.absolute().parent)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Create a folder under a temporary name, and rename it when it is complete."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        os.replace(draft, folder)
    except OSError as error:
        raise OSError(
            f"expected a writable folder in {str(folder)!r}, got {error.strerror or error}; free space, or use another --out"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm export``, run it and return the exit status."""
    parser = CommandParser(prog="sanm export", description="Export a trained method to a folder.")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["safetensors"], help="one or more formats")
    parser.add_argument("--input_dtype", choices=INPUTS, default="float32", help="type of the input images")
    parser.add_function_arguments(export, skip={"format", "input_dtype"}, as_group=False)
    return export(**parser.instantiate_classes(parser.parse_args(words)).as_dict())
