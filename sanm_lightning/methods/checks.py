"""Checks common to all methods: arguments, and callbacks of the trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch

__all__ = [
    "check_arguments",
    "check_callbacks",
    "check_choice",
    "check_num_classes",
    "check_range",
    "clamped_neighbors",
    "nonempty_selection",
    "refuse_compiled",
    "refuse_other_weights",
    "require",
    "require_divisible",
    "require_index",
    "require_noise_rate",
    "require_unscaled",
    "size_pair",
]


def check_arguments(num_classes: Any, network: Any, warmup_epochs: int, backend: Any) -> None:
    """Raise ValueError if an argument of :class:`~sanm_lightning.methods.NoisyLabelModule` is out of its range."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"expected num_classes >= 2, got {num_classes}; use the num_classes of the data module")
    if not isinstance(network, (str, nn.Module)):
        raise ValueError(f"expected a network as the name of a timm model or as a module, got {network!r}")
    if warmup_epochs < 0:
        raise ValueError(f"expected warmup_epochs >= 0, got {warmup_epochs}")
    if backend and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"expected compile_network true, false or one of {', '.join(torch.compiler.list_backends())}, got "
            f"{backend!r}"
        )


def check_network_options(network: Any, **options: Any) -> None:
    """Raise ValueError if an option of networks that are created by name is set for a network given as a module."""
    given = {} if isinstance(network, str) else {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        raise ValueError(
            f"expected {name} null with a network given as a module, got {value!r}; set it in the module, such as "
            "Normalized(module, mean, std)"
        )


def require(good: bool, expected: str, got: Any, advice: str) -> None:
    """Raise ValueError with the sentence of an argument that is out of its range, unless it is ``good``."""
    if not good:
        raise ValueError(f"expected {expected}, got {got!r}; {advice}")


def require_noise_rate(noise_rate: float | None) -> float:
    """Return the noise rate of a method that is told it.

    Raises:
        ValueError: if it is missing or not in [0, 1).
    """
    if noise_rate is None or not 0 <= noise_rate < 1:
        raise ValueError(
            f"expected noise_rate in [0, 1), got {noise_rate}; set noise_rate (--model.noise_rate) to the known or estimated "
            "fraction of wrong labels, such as the audit.json of sanm audit"
        )
    return noise_rate


RANGES: dict[str, Callable[[Any], bool]] = {
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in [-1, 1]": lambda value: -1 <= value <= 1,
    "> 0": lambda value: value > 0,
    ">= 0": lambda value: value >= 0,
    ">= 1": lambda value: value >= 1,
}


def check_range(expected: str, **arguments: Any) -> None:
    """Raise ValueError for the first argument out of a range.

    Args:
        expected: a range of ``RANGES``; followed by ``or null`` if None is in the range too.
        **arguments: values by the names of the arguments.
    """
    in_range, null = RANGES[expected.removesuffix(" or null")], expected.endswith(" or null")
    for name, value in arguments.items():
        good = null if value is None else in_range(value)
        require(good, f"{name} {expected}", value, "use the default")


def check_choice(choices: tuple[Any, ...], **arguments: Any) -> None:
    """Raise ValueError for the first argument that is none of the choices.

    Args:
        choices: two or more values.
        **arguments: values by the names of the arguments.
    """
    expected = " or ".join(map(repr, choices))
    for name, value in arguments.items():
        require(value in choices, f"{name} {expected}", value, "choose one of them")


def clamped_neighbors(k: int, num_samples: int, method: str) -> int:
    """Return k, or the number of other samples if it is smaller, with a warning."""
    if k < num_samples:
        return k
    rank_zero_warn(
        f"expected more than k = {k} samples for the neighbors of {method}, got {num_samples}; k is {num_samples - 1}"
    )
    return num_samples - 1


def nonempty_selection(selected: Tensor, epoch: int, method: str) -> Tensor:
    """Return the selected samples, shape (N,), bool, or all samples with a warning if none is selected."""
    if bool(selected.any()):
        return selected
    rank_zero_warn(
        f"expected a selection with samples in epoch {epoch} of {method}, got an empty one; training on all samples"
    )
    return torch.ones_like(selected)


def size_pair(image_size: Any) -> tuple[int, int]:
    """Return H, W in pixels of an argument ``image_size``; a number stands for a square.

    Raises:
        ValueError: if it is not one or two positive numbers.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(int(side) >= 1 for side in size):
        raise ValueError(
            f"expected image_size (H, W) in pixels, got {image_size!r}; use the image_size of the data module"
        )
    return int(size[0]), int(size[1])


@contextmanager
def refuse_other_weights(pl_module: Any) -> Iterator[None]:
    """Context manager that replaces torch's error on loading weights of another module by a sentence.

    Raises:
        ValueError: if the weights belong to another method or network.
    """
    try:
        yield
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:] if line.strip()] or [str(error)]
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise ValueError(
            f"expected the weights of {type(pl_module).__name__} as configured, got other weights: "
            f"{reasons[0][:200]}{more}; use the method, the network and the SANM options of the checkpoint"
        ) from error


def check_num_classes(network: Any, num_classes: int) -> None:
    """Raise ValueError if a network given as a module, or its linear classifier, states another number of classes."""
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
    classes = getattr(network, "num_classes", getattr(classifier, "out_features", num_classes))
    if isinstance(classes, int) and classes != num_classes:
        raise ValueError(
            f"expected a network with num_classes = {num_classes} logits, got {classes} from "
            f"{type(getattr(network, 'network', network)).__name__}; create it with num_classes={num_classes}"
        )


def check_callbacks(pl_module: Any) -> None:
    """Raise ValueError if the trainer has a callback of Lightning that the method does not support."""
    callbacks = [] if pl_module._trainer is None else pl_module._trainer.callbacks
    has_backbone = isinstance(getattr(pl_module, "backbone", None), nn.Module)
    if not has_backbone and any(isinstance(part, BackboneFinetuning) for part in callbacks):
        raise ValueError(
            f"expected a submodule 'backbone' for BackboneFinetuning, got none in {type(pl_module).__name__}; remove the "
            "callback, or define stages() with Stage(frozen=...) in a subclass"
        )


def require_index(batch: NoisyBatch, method: str) -> Tensor:
    """Return the positions (B,) of a batch's samples in the training set.

    Raises:
        ValueError: if the batch has no index.
    """
    if batch.index is None:
        raise ValueError(
            f"expected batches with an index for {method}, which stores predictions of each sample, got none; use a "
            "data module of this package, or return named tuples with the fields image, label and index from the data "
            "set"
        )
    return batch.index


def require_divisible(num_samples: int, method: str) -> None:
    """Raise ValueError for a training set of fewer than 2 samples, which cannot be divided into two sets."""
    if num_samples < 2:
        raise ValueError(
            f"expected 2 or more training samples for {method}, which divides them into two sets, got {num_samples}; add "
            "samples"
        )


def require_unscaled(optimizer: Any, trainer: Any, purpose: str) -> None:
    """Raise ValueError for an optimizer that unscales gradients in its step, after the hooks that read them."""
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if scales and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"expected an optimizer whose gradients are unscaled before {purpose}, got a fused {type(optimizer).__name__} "
            "with precision 16-mixed; set fused: false, or precision bf16-mixed"
        )


def refuse_compiled(method: str, compile_network: Any) -> None:
    """Raise ValueError for a compiled network, whose training pass cannot be differentiated more than once."""
    if compile_network:
        raise ValueError(
            f"expected compile_network false for {method}, which differentiates its training pass several times, got "
            f"{compile_network!r}; omit compile_network"
        )
