"""Where to hide: callables that give an activation map (SANM, Eq. 1, its Table 4, and the released code)."""

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
from sanm_lightning.sanm.inference import inference_context
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
    """What a network makes of the unmasked images of a batch, without gradient."""

    network: Backbone
    images: Tensor
    """(B, 3, H, W)."""
    features: Tensor
    """As ``forward_features`` gives them, (B, D, h, w)."""
    logits: Tensor
    """(B, C)."""
    generator: torch.Generator
    """Source of randomness, on the device of the images."""


Saliency = Callable[[NetworkOutput], Tensor]
"""Gives activation maps, shape (B, h, w) of any size; the largest value is where to hide."""


def cam(output: NetworkOutput) -> Tensor:
    """Class activation map of the predicted class. Source: SANM, Eq. 1."""
    maps = feature_map(output.features, output.network.num_features)
    return class_activation_map(maps, classifier_weight(output.network, maps.shape[1]), output.logits.argmax(1))


def energy(output: NetworkOutput) -> Tensor:
    """Squared features, summed over the channels. Source: the authors' released code."""
    return energy_map(feature_map(output.features, output.network.num_features))


def random_place(output: NetworkOutput) -> Tensor:
    """A map of noise: a control for the place of the mask."""
    size = (len(output.images), *output.images.shape[2:])
    return torch.rand(size, generator=output.generator, device=output.images.device)


_PLACES: dict[str, Saliency] = {"cam": cam, "energy": energy, "random": random_place}


def resolve_saliency(place: Any) -> Saliency:
    """Turn the ``place`` of SANM into a callable.

    Args:
        place: ``"cam"``, ``"energy"`` or ``"random"``; a callable; or the class path and arguments of one,
            as checkpoints hold them.

    Raises:
        ValueError: if it is none of these.
    """
    place = made_from(place) if isinstance(place, dict) else place
    found = _PLACES.get(place) if isinstance(place, str) else place
    if not callable(found):
        raise ValueError(
            f"SANM expected a place among {', '.join(_PLACES)}, or a callable, got {place!r}; choose one of them"
        )
    return found


def probe(network: Backbone, image_size: tuple[int, int], generator: torch.Generator, like: Tensor) -> NetworkOutput:
    """Run a network on two random images, to learn the shape of its feature map.

    Args:
        network: by timm's conventions.
        image_size: H, W of the images in pixels.
        generator: source of the images, on the CPU.
        like: a tensor of the device and type of the network.

    Raises:
        ValueError: if such images do not fit in memory.
    """
    try:
        images = torch.rand(2, 3, *image_size, generator=generator).to(like.device, like.dtype)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"expected an image_size that fits in memory, got {image_size[0]} x {image_size[1]}; use a smaller one"
        ) from error
    with inference_context(network, images):
        features = network.forward_features(images)
        return NetworkOutput(network, images, features, network.forward_head(features), generator)


def check_saliency(saliency: Saliency, output: NetworkOutput) -> None:
    """Refuse a network whose activation map would mean nothing.

    Args:
        saliency: the callable that is going to give the map.
        output: from :func:`probe`.

    Raises:
        ValueError: if the logits are no linear map of the pooled features (``cam``), or the map has one place only.
    """
    if saliency not in (cam, energy):
        return
    maps = feature_map(output.features, output.network.num_features)
    if saliency is cam:
        require_pooled_linear(output.network, maps, output.logits)
    if maps.shape[2] * maps.shape[3] == 1:
        height, width = output.images.shape[2:]
        raise ValueError(
            f"expected a feature map of more than one place, got 1 x 1 ({type(output.network).__name__} on images of {height} "
            f"x {width}); use a larger image_size, a network of smaller stride, or place: random"
        )


class FrozenNetwork:
    """Activation maps of a pre-trained timm model that is not trained.

    Source: SANM, Table 4 ("masks from pre-trained backbones").

    Images are resized to the model's own input size and normalised with its own statistics. It is not a part of the module
    that uses it: no parameters, nothing in checkpoints.

    Args:
        name: timm model name with a linear head after global pooling, as ``resnet50``.
        pretrained: load pre-trained weights: those of an installed distribution where there is one for ``name``
            (``tf_efficientnet_lite0``, the extra ``pretrained``), else timm's, which are downloaded on first use. False only
            makes sense with ``checkpoint``, or in tests.
        checkpoint: a file of weights for ``name``, see :func:`~sanm_lightning.models.load_pretrained`.

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
        self.maps(torch.zeros(1, 3, *self.size))  # fail now on an unsuitable network, not after the warm-up

    def __call__(self, output: NetworkOutput | Tensor) -> Tensor:
        """Return the activation map (B, h, w) of the class that the frozen network predicts for the images."""
        return self.maps(output if isinstance(output, Tensor) else output.images)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> activation map (B, h, w) of the class that the frozen network predicts."""
        self.network.to(images.device)
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # moved once: a copy would wait
        resized = F.interpolate(images.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
        normalised = (resized - self.mean) / self.std
        features = self.network.forward_features(normalised)
        maps = feature_map(features, self.network.num_features)
        classes = self.network.forward_head(features).argmax(1)
        return class_activation_map(maps, classifier_weight(self.network, maps.shape[1]), classes)
