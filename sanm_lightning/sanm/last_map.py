"""Find the last feature map of a network, by computing the logits again from it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sanm_lightning.random_streams import named_generator

__all__ = ["Place", "channels_of", "classifier_name", "depends", "logits_of", "nonzero_classifier", "trace"]

MAX_CANDIDATES = 64
"""Number of last feature maps that are tried."""


class Place(NamedTuple):
    """Input or output of a submodule."""

    name: str
    at_input: bool

    def __str__(self) -> str:
        return f"{'input' if self.at_input else 'output'} of {self.name}"


class Trace(NamedTuple):
    """Tensors of one forward pass."""

    logits: Tensor
    """(B, C)."""
    maps: list[Place]
    """Places of the feature maps of more than one position, the last one first; one place for each tensor."""
    points: list[tuple[str, Tensor]]
    """Submodules with convolutions whose outputs are maps of one position, with these outputs, in the order of execution."""
    outputs: list[tuple[str, Tensor]]
    """Outputs of all submodules, in the order of execution."""


def logits_of(output: Any) -> Any:
    """Return the logits of a network's output; some networks return them as an attribute, with auxiliary logits."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def channels_of(features: Tensor, image_size: Sequence[int]) -> int | None:
    """Return the number of channels of a feature map of images of H, W pixels; None for other tensors.

    Maps are (B, D, h, w) or (B, h, w, D), of which the one with the proportions of the image is taken, or tokens (B, N, D).
    """
    if features.ndim == 3:
        return features.shape[2]
    if features.ndim != 4:
        return None

    def skew(height: int, width: int) -> float:
        """Return how much the proportions differ from those of the image, >= 1."""
        ratio = height * image_size[1] / (width * image_size[0])
        return max(ratio, 1 / ratio)

    first, last = skew(*features.shape[2:]), skew(*features.shape[1:3])
    return features.shape[1] if first <= last else features.shape[3]


def trace(network: nn.Module, images: Tensor) -> Trace:
    """Run a network on images (B, 3, H, W), and return its feature maps, outputs and logits."""
    found: dict[int, tuple[Place, Tensor]] = {}
    outputs: list[tuple[str, Tensor]] = []

    def note(place: Place, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:1] != images.shape[:1]:
            return
        if not place.at_input:
            outputs.append((place.name, value))
            found.pop(id(value), None)  # in the order of the last output
        found.setdefault(id(value), (place, value))

    def listen(name: str, module: nn.Module) -> list[Any]:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            note(Place(name, True), inputs[0] if inputs else None)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            note(Place(name, False), output)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    hooks = [hook for name, module in network.named_modules() if name for hook in listen(name, module)]
    try:
        logits = logits_of(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [(*pair, _positions(pair[1], images.shape[2:])) for pair in found.values() if pair[1].ndim in (3, 4)]
    maps = [place for place, value, positions in reversed(tensors) if value is not images and positions > 1]
    points = [
        (place.name, value)
        for place, value, positions in tensors
        if positions == 1 and not place.at_input and _convolves(network.get_submodule(place.name))
    ]
    return Trace(logits, maps[:MAX_CANDIDATES], points, outputs)


def _convolves(module: nn.Module) -> bool:
    return any(weight.ndim == 4 for weight in module.parameters())


def _positions(features: Tensor, image_size: Sequence[int]) -> int:
    channels = channels_of(features, image_size)
    return features[0].numel() // max(1, channels or 1)


def classifier_name(network: nn.Module, pass_: Trace) -> str | None:
    """Return the name of the last layer with a weight, if its output is the logits; None if there is none."""
    classes = pass_.logits.shape[1]
    for name, output in reversed(pass_.outputs):
        weight = getattr(network.get_submodule(name), "weight", None)
        if isinstance(weight, Tensor) and len(weight) == classes and output.numel() == pass_.logits.numel():
            return name if torch.equal(output.flatten(1), pass_.logits) else None
    return None


@contextlib.contextmanager
def nonzero_classifier(classifier: Any) -> Iterator[None]:
    """Context manager that gives a classifier of weights 0 (a usual initialization) random weights until exit.

    Its logits would not depend on the feature map.
    """
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or bool(weight.any()):
        yield
        return
    drawn = torch.randn(weight.shape, generator=named_generator("classifier of zeros", 0))
    try:
        weight.data.copy_(drawn)
        yield
    finally:
        weight.data.zero_()


def depends(logits: Tensor, features: Tensor, as_map: Callable[[Tensor], Tensor]) -> bool:
    """Return whether logits (B, C) have a gradient with respect to any position of the map of ``features``.

    Args:
        logits: computed from ``features``, with a graph.
        features: tensor that requires a gradient.
        as_map: function that selects the positions of the map, as :func:`feature_map` does.
    """
    if not logits.requires_grad:
        return False
    with torch.enable_grad():
        mixed = (logits.float() * torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)).sum()
    (gradient,) = torch.autograd.grad(mixed, features, allow_unused=True)
    return gradient is not None and bool((as_map(gradient) != 0).any())
