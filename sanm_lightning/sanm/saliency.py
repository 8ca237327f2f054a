"""Activation maps for the position of the mask (SANM, Eq. 1, its Table 4, and the released code)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.models import load_pretrained
from sanm_lightning.sanm.activation import (
    Backbone,
    class_activation_map,
    classifier_weight,
    energy_map,
    feature_map,
    require_pooled_linear,
)
from sanm_lightning.sanm.inference import inference_context, input_channels
from sanm_lightning.sanm.options import made_from

__all__ = [
    "FrozenNetwork",
    "NetworkOutput",
    "Saliency",
    "cam",
    "check_saliency",
    "energy",
    "probe",
    "random_place",
    "resolve_saliency",
]


class NetworkOutput(NamedTuple):
    """Output of a network for the unmasked images of a batch, without gradient."""

    network: Backbone
    images: Tensor
    """(B, 3, H, W)."""
    features: Tensor
    """Output of ``forward_features``, (B, D, h, w)."""
    logits: Tensor
    """(B, C)."""
    generator: torch.Generator
    """Random generator, on the device of the images."""


Saliency = Callable[[NetworkOutput], Tensor]
"""Function that returns activation maps, shape (B, h, w) of any size; the maximum is the position of the mask."""


def cam(output: NetworkOutput) -> Tensor:
    """Return the class activation map of the predicted class. Source: SANM, Eq. 1."""
    maps = feature_map(output.features, output.network.num_features)
    return class_activation_map(maps, classifier_weight(output.network, maps.shape[1]), output.logits.argmax(1))


def energy(output: NetworkOutput) -> Tensor:
    """Return the squared features, summed over the channels. Source: the authors' released code."""
    return energy_map(feature_map(output.features, output.network.num_features))


def random_place(output: NetworkOutput) -> Tensor:
    """Return a map of uniform noise, as a control for the position of the mask."""
    size = (len(output.images), *output.images.shape[2:])
    return torch.rand(size, generator=output.generator, device=output.images.device)


_PLACES: dict[str, Saliency] = {"cam": cam, "energy": energy, "random": random_place}


def resolve_saliency(place: Any) -> Saliency:
    """Convert the ``place`` option of SANM to a callable.

    Args:
        place: ``"cam"``, ``"energy"`` or ``"random"``; a callable; or the class path and arguments of a callable, as in
            checkpoints.

    Returns:
        The callable.

    Raises:
        ValueError: if it is none of these.
    """
    place = made_from(place) if isinstance(place, dict) else place
    found = _PLACES.get(place) if isinstance(place, str) else place
    if not callable(found):
        raise ValueError(
            f"expected a place among {', '.join(_PLACES)}, or a callable, got {place!r}; choose one of them"
        )
    return found


def probe(network: Backbone, image_size: tuple[int, int], generator: torch.Generator, like: Tensor) -> NetworkOutput:
    """Run a network on two random images, to find the shape of its feature map.

    Args:
        network: network with timm's interface.
        image_size: H, W of the images in pixels.
        generator: random generator of the images, on the CPU.
        like: a tensor with the device and dtype of the network.

    Returns:
        The output of the network.

    Raises:
        ValueError: if such images do not fit in memory.
    """
    try:
        images = torch.rand(2, input_channels(network), *image_size, generator=generator).to(like.device, like.dtype)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"expected an image_size that fits in memory, got {image_size[0]} x {image_size[1]}; use a smaller one"
        ) from error
    with inference_context(network, images):
        features = network.forward_features(images)
        return NetworkOutput(network, images, features, network.forward_head(features), generator)


def check_saliency(saliency: Saliency, output: NetworkOutput) -> None:
    """Check that the activation map of a network is meaningful.

    Args:
        saliency: the callable that returns the map.
        output: output of :func:`probe`.

    Raises:
        ValueError: if the logits are not a linear map of the pooled features (``cam``), or the map has one position
            only.
    """
    if saliency not in (cam, energy):
        return
    maps = feature_map(output.features, output.network.num_features)
    if saliency is cam:
        require_pooled_linear(output.network, maps, output.logits)
    if maps.shape[2] * maps.shape[3] == 1:
        height, width = output.images.shape[2:]
        raise ValueError(
            f"expected a feature map of more than one position, got 1 x 1 ({type(output.network).__name__} on images "
            f"of {height} x {width}); use a larger image_size, a network of smaller stride, or place: random"
        )


class FrozenNetwork:
    """Activation maps of a frozen, pre-trained timm model.

    Source: SANM, Table 4 ("masks from pre-trained backbones").

    Images are resized to the model's input size and normalized with its statistics. The model is not a submodule: it
    has no trained parameters and is not saved in checkpoints.

    Args:
        name: name of a timm model with a linear head after global pooling, such as ``resnet50``.
        pretrained: whether to load pre-trained weights: those of an installed distribution if available
            (``tf_efficientnet_lite0``, the extra ``pretrained``), or else those of timm, which are downloaded on first
            use; use False with ``checkpoint`` or in tests.
        checkpoint: weight file for ``name``, see :func:`~sanm_lightning.models.load_pretrained`.

    Raises:
        ValueError: if the weights cannot be loaded, or the network has no linear head after global pooling.
    """

    def __init__(self, name: str, pretrained: bool = True, checkpoint: str | None = None) -> None:
        self.options = {"name": name, "pretrained": pretrained, "checkpoint": checkpoint}
        self.network: Any
        if pretrained or checkpoint:
            self.network = load_pretrained(name, checkpoint).network
        else:
            with torch.random.fork_rng(devices=[]):
                self.network = timm.create_model(name).eval().requires_grad_(False)
        config = resolve_data_config({}, model=self.network)
        self.size = tuple(config["input_size"][1:])
        self.mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self.std = torch.tensor(config["std"]).view(3, 1, 1)
        self.maps(torch.zeros(1, 3, *self.size))  # raises an error for unsupported networks

    def __call__(self, output: NetworkOutput | Tensor) -> Tensor:
        """Return the activation maps (B, h, w) of the classes that the frozen network predicts."""
        return self.maps(output if isinstance(output, Tensor) else output.images)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Return the activation maps (B, h, w) of the predicted classes for images (B, 3, H, W) in [0, 1]."""
        self.network.to(images.device)
        self.mean, self.std = (
            self.mean.to(images.device),
            self.std.to(images.device),
        )  # moved once, to avoid a synchronizing copy
        resized = F.interpolate(images.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
        normalized = (resized - self.mean) / self.std
        features = self.network.forward_features(normalized)
        maps = feature_map(features, self.network.num_features)
        classes = self.network.forward_head(features).argmax(1)
        return class_activation_map(maps, classifier_weight(self.network, maps.shape[1]), classes)
