"""Load trained methods, and predict class probabilities with them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sanm_lightning import methods
from sanm_lightning.class_names import class_names_of
from sanm_lightning.data.decode import Resize
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.safe_files import read_checkpoint
from sanm_lightning.sanm.inference import input_channels

__all__ = ["Predictor", "TrainedMethod", "load_method", "load_predictor"]


class TrainedMethod(NamedTuple):
    """Trained method of a checkpoint.

    Attributes:
        module: the method with its weights, in evaluation mode, on the CPU.
        class_names: C names in the order of the class indices; numbers if the checkpoint has no names.
        decode_size: side of the decoded squares in pixels, before the center crop to ``module.image_size``.
        resize: how images become squares, ``crop`` or ``stretch``.
        channels: number of channels of the images.
    """

    module: NoisyLabelModule
    class_names: list[str]
    decode_size: int
    resize: Resize = "crop"
    channels: int = 3


class Predictor(nn.Module):
    """Module from images to class probabilities, including normalization and ensemble, without parts used in training only.

    Args:
        module: trained method, which is copied.

    Raises:
        ValueError: if the method trains no classifier.
    """

    def __init__(self, module: NoisyLabelModule) -> None:
        super().__init__()
        if not module.trains_classifier:
            raise ValueError(
                f"expected a method with a trained classifier, got {type(module).__name__}, which trains an encoder; export it "
                "as safetensors, or train a method from it"
            )
        self.image_size = module.image_size
        self.method = _used_parts(module)

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities (B, C), float32, of images (B, C, H, W), uint8 or floating point in [0, 1]."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        probabilities: Tensor = self.method(scaled).float().softmax(1)
        return probabilities


def _used_parts(module: NoisyLabelModule) -> NoisyLabelModule:
    """Copy a method without the modules that its forward does not call, such as decoders, and without its own state."""
    slim = copy.deepcopy(module).eval().requires_grad_(False)
    used: set[str] = set()
    handles = [
        part.register_forward_hook(lambda *_, name=name: used.add(name.split(".")[0]))
        for name, part in slim.named_modules()
        if name
    ]
    with torch.no_grad():
        slim(torch.zeros(1, input_channels(slim.network), *slim.image_size))
    for handle in handles:
        handle.remove()
    for name, _ in list(slim.named_children()):
        if name not in used:
            delattr(slim, name)
    for name, _ in list(slim.named_buffers(recurse=False)):
        delattr(slim, name)
    return slim


def load_predictor(path: str | Path, method: type[NoisyLabelModule] | None = None) -> Predictor:
    """Return the predictor of a checkpoint; see :func:`load_method`.

    Args:
        path: checkpoint of a method of this package.
        method: class of a custom method, for its checkpoints.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a checkpoint of a method, or the method trains no classifier.
    """
    return Predictor(load_method(path, method).module)


def load_method(path: str | Path, method: type[NoisyLabelModule] | None = None) -> TrainedMethod:
    """Load a trained method from its checkpoint, without unpickling code.

    Args:
        path: checkpoint of a method of this package whose network was configured by name.
        method: class of a custom method, for its checkpoints.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a checkpoint, or a checkpoint of another module.
    """
    checkpoint = read_checkpoint(path)
    kept = checkpoint.get("method")
    name = kept.get("name") if isinstance(kept, Mapping) else None
    if method is None:
        found = getattr(methods, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, NoisyLabelModule)):
            raise ValueError(
                f"expected a checkpoint of a method of this package in {str(path)!r}, got one of {name or 'another module'}; "
                "set --method to the class of a custom method, or use Trainer.predict for other modules"
            )
        method = found
    settings = checkpoint.get("hyper_parameters")
    if not isinstance(settings, Mapping) or not isinstance(settings.get("network"), str):
        raise ValueError(
            f"expected a checkpoint with the name of its network in {str(path)!r}, got one without it; load the module in "
            "Python, and use sanm_lightning.predictor.Predictor"
        )
    try:
        module = method.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    except (TypeError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"expected a checkpoint of {method.__name__} in {str(path)!r}, got one that does not fit "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); use the version of this package that wrote it"
        ) from error
    return TrainedMethod(
        module,
        class_names_of(checkpoint),
        _decode_size(checkpoint, module.image_size),
        "stretch" if "stretch" in _data_settings(checkpoint, "resize") else "crop",
        input_channels(module.network),
    )


def _decode_size(checkpoint: Mapping[str, Any], image_size: tuple[int, int]) -> int:
    """Return the decode size of the training data; the larger side of the images if it is unknown."""
    known = _data_settings(checkpoint, "decode_size")
    sides = [max(size) if isinstance(size, (list, tuple)) else size for size in known if size]
    return max(*image_size, *(int(side) for side in sides[:1]))


def _data_settings(checkpoint: Mapping[str, Any], name: str) -> list[Any]:
    """Return the values of a setting in the state of the data module, and in the settings of the run."""
    states = [part for part in checkpoint.values() if isinstance(part, Mapping) and "draws" in part]
    data = (checkpoint.get("settings") or {}).get("data") or {}
    return [part.get(name) for part in (*states, data.get("init_args") or {})]
