"""Activation maps for the position of the mask (SANM, Eq. 1, its Table 4, and the released code)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.models import load_pretrained
from sanm_lightning.random_streams import named_generator
from sanm_lightning.sanm.activation import (
    Backbone,
    class_activation_map,
    classifier_weight,
    energy_map,
    feature_map,
    gradient_activation_map,
    is_pooled_linear,
)
from sanm_lightning.sanm.feature_extractor import with_feature_map
from sanm_lightning.sanm.inference import inference_context, input_channels, is_out_of_memory
from sanm_lightning.sanm.last_map import depends, nonzero_classifier
from sanm_lightning.sanm.options import made_from

__all__ = [
    "ActivationMaps",
    "FrozenNetwork",
    "NetworkOutput",
    "Saliency",
    "activation_of",
    "cam",
    "energy",
    "grad_cam",
    "random_place",
    "resolve_saliency",
    "run_network",
]


class NetworkOutput(NamedTuple):
    """Output of a network for the unmasked images of a batch, without gradient, except for :func:`grad_cam`."""

    network: Backbone
    images: Tensor
    """(B, 3, H, W)."""
    features: Tensor
    """Output of ``forward_features``: (B, D, h, w), or another layout that :attr:`maps` converts."""
    logits: Tensor
    """(B, C)."""
    generator: torch.Generator | None
    """Random generator, on the device of the images."""

    @property
    def maps(self) -> Tensor:
        """The features as maps, shape (B, D, h, w)."""
        return feature_map(self.features, self.network.num_features, self.images.shape[2:])

    def detach(self) -> "NetworkOutput":
        """Return the output without its graph."""
        return self._replace(features=self.features.detach(), logits=self.logits.detach())


Saliency = Callable[[NetworkOutput], Tensor]
"""Function that returns activation maps, shape (B, h, w) of any size; the maximum is the position of the mask."""


def cam(output: NetworkOutput) -> Tensor:
    """Return the class activation map of the predicted class. Source: SANM, Eq. 1."""
    maps = output.maps
    return class_activation_map(maps, classifier_weight(output.network, maps.shape[1]), output.logits.argmax(1))


def grad_cam(output: NetworkOutput) -> Tensor:
    """Return the gradient-weighted class activation map of the predicted class, see :func:`gradient_activation_map`.

    The gradient is that of the head only, and parameters receive none. ``output`` is that of :func:`run_network` with
    ``gradient``.
    """
    with torch.enable_grad():
        predicted = output.logits.detach().argmax(1, keepdim=True)
        (gradient,) = torch.autograd.grad(output.logits.gather(1, predicted).sum(), output.features)
    output = output.detach()
    return gradient_activation_map(output.maps, output._replace(features=gradient).maps)


def energy(output: NetworkOutput) -> Tensor:
    """Return the squared features, summed over the channels. Source: the authors' released code."""
    return energy_map(output.maps)


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


def run_network(
    network: Backbone,
    images: Tensor,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    gradient: bool = False,
) -> NetworkOutput:
    """Run a network on images (B, 3, H, W), without gradient.

    Args:
        network: network with timm's interface.
        images: shape (B, 3, H, W).
        features: features of the images, if available.
        generator: random generator of the output.
        gradient: whether to record the gradient of the logits with respect to the features, in the head only.
    """
    features = network.forward_features(images) if features is None else features.detach()
    if not gradient:
        features = features.detach()
        return NetworkOutput(network, images, features, network.forward_head(features).detach(), generator)
    if not features.requires_grad:
        features = features.detach().requires_grad_()
    with torch.enable_grad():
        return NetworkOutput(network, images, features, network.forward_head(features), generator)


def activation_of(saliency: Saliency, network: Backbone, output: NetworkOutput) -> Saliency:
    """Return the function for the activation maps of a network, and check that the maps lead to its logits.

    Args:
        saliency: the ``place`` option as a callable; callables other than :func:`cam` are returned as they are.
        network: network with timm's interface.
        output: output of :func:`run_network` with ``gradient``.

    Returns:
        For :func:`cam`, the class activation map if the classifier is one linear layer on the averaged feature map,
        where Eq. 1 is exact, and otherwise :func:`grad_cam`, of which it is the special case.

    Raises:
        ValueError: if the logits do not depend on the feature map, or the map has one position only (:func:`cam` and
            :func:`energy`).
    """
    if saliency not in (cam, energy):
        return saliency
    name, (height, width) = _kind(network), output.images.shape[2:]
    maps = output.maps.detach()
    if maps.shape[2] * maps.shape[3] == 1:
        raise ValueError(
            f"expected a feature map of more than one position, got 1 x 1 ({name} on images of {height} x {width}); use "
            "a larger image_size, a network of smaller stride, or place: random (--model.sanm.place random)"
        )
    if saliency is cam and is_pooled_linear(network, maps, output.logits.detach()):
        return cam
    if not depends(output.logits, output.features, lambda part: output._replace(features=part).maps):
        raise ValueError(
            f"expected logits of {name} that depend on the feature map, got none that depend on a position of the output "
            "of forward_features; use FeatureExtractor(network, image_size), SANMMixin or SANMCallback, which take an "
            "earlier layer, or place: random (--model.sanm.place random)"
        )
    return grad_cam if saliency is cam else energy


def _kind(network: Any) -> str:
    """Return the class name of a network, without wrappers."""
    return type(getattr(network, "network", network)).__name__


class ActivationMaps:
    """Activation maps of a network for the position of the mask.

    Args:
        saliency: the ``place`` option as a callable; None computes no maps.
    """

    def __init__(self, saliency: Saliency | None) -> None:
        self.saliency = saliency
        self.chosen: Saliency | None = None
        """:func:`activation_of` the network."""
        self.choice: str | None = None
        """Sentence with the choice between class activation map and Grad-CAM; None for other maps."""

    def build(self, network: Backbone, image_size: Sequence[int], generator: torch.Generator) -> NetworkOutput:
        """Choose the activation map for a network, and return the network's output for two random images.

        Args:
            network: network with timm's interface, on any device.
            image_size: H, W of the images in pixels.
            generator: random generator of the images, on the CPU.

        Raises:
            ValueError: if two such images do not fit in memory or fail in the network, or the network has no activation
                map, see :func:`activation_of`. Exhausted memory in the network is raised as it is.
        """
        like = next(network.parameters(), torch.zeros(())) if isinstance(network, nn.Module) else torch.zeros(())
        try:
            images = torch.rand(2, input_channels(network), *image_size, generator=generator)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"expected an image_size that fits in memory, got {image_size[0]} x {image_size[1]}; use a smaller one"
            ) from error
        images = images.to(like.device, like.dtype)
        checked = self.saliency in (cam, energy)
        classifier = network.get_classifier() if checked else None
        # the outputs of an untrained network hardly depend on the image with running statistics
        with inference_context(network, images, batch_statistics=True), nonzero_classifier(classifier):
            try:
                output = run_network(network, images, gradient=checked)
            except (RuntimeError, AssertionError) as error:  # networks of timm assert the size
                if is_out_of_memory(error):
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"expected an image_size that {type(network).__name__} accepts, got {image_size[0]} x {image_size[1]} "
                    f"({reason}); use another one, or another network"
                ) from error
            self._choose(network, output)
            return output.detach()

    def __call__(
        self,
        network: Backbone,
        images: Tensor,
        features: Tensor | None,
        generator: torch.Generator,
        batch_statistics: bool,
        in_unit_range: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[NetworkOutput, Tensor | None]:
        """Return the network's output for images (B, 3, H, W), without gradient, and activation maps (B, h, w).

        Args:
            network: network with timm's interface.
            images: shape (B, 3, H, W).
            features: features of the images, if available.
            generator: random generator, on the device of the images.
            batch_statistics: whether batch norm uses the statistics of the batch.
            in_unit_range: function that converts the images to [0, 1] for a :class:`FrozenNetwork`; None for such images.
        """
        gradient = self.chosen is grad_cam or (self.chosen is None and self.saliency is not None)
        with inference_context(network, images, batch_statistics):
            output = run_network(network, images, features, generator, gradient)
            if self.chosen is None:  # without `build`
                self._choose(network, output)
        if self.chosen is None:
            return output, None
        with inference_context(network, images):
            if in_unit_range is not None and isinstance(self.chosen, FrozenNetwork):
                output = output._replace(images=in_unit_range(images))
            maps = self.chosen(output)
        return output.detach(), maps

    def _choose(self, network: Backbone, output: NetworkOutput) -> None:
        if self.saliency is None:
            return
        self.chosen = activation_of(self.saliency, network, output)
        if self.saliency is cam:
            name = _kind(network)
            place = getattr(network, "map_place", "the output of forward_features")
            kind, why = "class activation map", "its head is one linear layer after global average pooling"
            if self.chosen is grad_cam:
                kind, point = "Grad-CAM", getattr(network, "last_point", None)
                height, width = output.images.shape[2:]
                why = (
                    f"the output of {point} has one position on images of {height} x {width}"
                    if point
                    else why.replace("is one", "is not one")
                )
            self.choice = f"masks are centered on the {kind} of {name} at {place}, since {why}"


class FrozenNetwork:
    """Activation maps of a frozen, pre-trained timm model: class activation maps where they are exact, else Grad-CAM.

    Source: SANM, Table 4 ("masks from pre-trained backbones").

    Images are resized to the model's input size and normalized with its statistics. The model is not a submodule: it
    has no trained parameters and is not saved in checkpoints.

    Args:
        name: name of a timm model, such as ``resnet50``.
        pretrained: whether to load pre-trained weights: those of an installed distribution if available
            (``tf_efficientnet_lite0``, the extra ``pretrained``), or else those of timm, which are downloaded on first
            use; use False with ``checkpoint`` or in tests.
        checkpoint: weight file for ``name``, see :func:`~sanm_lightning.models.load_pretrained`.

    Raises:
        ValueError: if the weights cannot be loaded, or the network has no feature map that leads to its logits.
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
        self._backbone = with_feature_map(self.network, self.size)
        self._maps = ActivationMaps(cam)
        self._maps.build(self._backbone, self.size, named_generator("frozen network", 0))

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
        maps = self._maps(self._backbone, normalized, None, torch.default_generator, batch_statistics=False)[1]
        assert maps is not None
        return maps
