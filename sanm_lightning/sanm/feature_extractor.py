"""Feature map, logits and classifier of networks without timm's interface."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.random_streams import named_generator
from sanm_lightning.sanm.activation import feature_map, is_pooled_linear
from sanm_lightning.sanm.inference import inference_context, input_channels, is_out_of_memory
from sanm_lightning.sanm.last_map import (
    Place,
    channels_of,
    classifier_name,
    depends,
    logits_of,
    nonzero_classifier,
    trace,
)

__all__ = ["FeatureExtractor", "FeatureTap", "shadow", "with_feature_map"]

TIMM_INTERFACE = ("forward_features", "forward_head", "get_classifier", "num_features")


class FeatureExtractor(nn.Module):
    """Wrapper of a classifier with timm's interface that stores the features of its last forward pass.

    The features of a timm model are those of ``forward_features``, if its logits are computed from them. For other
    networks (torchvision, custom), they are the last feature map of more than one position that determines the logits:
    the network is run on other images with this map in place of theirs, and must return the same logits. They are found
    as input or output of a submodule, or are the output of a given layer. ``forward_features`` then runs the whole
    network and stores the logits for ``forward_head``. The constructor runs the network on random images.

    Tokens of vision transformers are taken where the logits depend on the patches: before the last block, if only the
    class token reaches the classifier.

    Args:
        network: classifier of images (B, 3, H, W) with logits (B, C).
        image_size: H, W of the images in pixels.
        layer: name of the submodule whose output is the last feature map; None detects it.
        need_classifier: whether the logits must be the output of a layer with a weight, as those of a classifier, in
            contrast to the features of an encoder.
        need_map: whether to require a feature map; False uses the images in networks without one.

    Raises:
        ValueError: if no feature map or no classifier is found, or the network fails on the images.
    """

    features: Tensor | None = None
    logits: Tensor | None = None
    pooled: Tensor | None = None

    def __init__(
        self,
        network: nn.Module,
        image_size: Sequence[int],
        layer: str | None = None,
        need_classifier: bool = True,
        need_map: bool = True,
    ) -> None:
        super().__init__()
        self.network: Any = network
        self.exact = True
        """Whether the logits are one linear map of the averaged feature map."""
        self.place: Place | None = None
        """Where the feature map is taken; None means the output of ``forward_features``, or the images."""
        self.last_point: str | None = None
        """Later submodule whose output has one position and is classified by one linear layer, if there is one."""
        self._undo: list[Callable[[], None]] = []
        self._classifier: str | None = None
        self._given: Tensor | None = None  # replaces the feature map in the current pass
        self._recording = False  # whether the current pass records the gradient of the feature map
        self._timm = layer is None and all(hasattr(network, name) for name in TIMM_INTERFACE)
        like = next(network.parameters(), torch.zeros(()))
        shape = (2, 4, input_channels(network), *image_size)
        images = torch.rand(shape, generator=named_generator("feature map", 0)).to(like)
        self._image_shape = tuple(images.shape[2:])
        try:
            with torch.compiler.set_stance("force_eager"), inference_context(self, images, batch_statistics=True):
                self._attach(images[0], images[1], layer, need_classifier, need_map)
        except Exception as error:
            self.remove()
            if isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            name, shape = type(network).__name__, tuple(images.shape[1:])
            raise ValueError(
                f"expected {name} to accept images {shape}, got {type(error).__name__}: {error}"
            ) from error
        self.forget()

    @property
    def hooked(self) -> bool:
        """Whether the feature map is read by hooks, in contrast to timm's interface."""
        return not self._timm

    @property
    def map_place(self) -> str:
        """Where the feature map is taken, for messages."""
        return "the output of forward_features" if self._timm else f"the {self.place}" if self.place else "the images"

    # Choice of the feature map

    def _attach(self, images: Tensor, other: Tensor, layer: str | None, need_classifier: bool, need_map: bool) -> None:
        name = type(self.network).__name__
        if layer is not None:
            try:
                self.network.get_submodule(layer)
            except AttributeError:
                raise ValueError(
                    f"expected a layer {layer!r} in {name}, got no such submodule; check layer= (sanm_layer= of the mixin)"
                ) from None
        seen = trace(self.network, images)
        if not (isinstance(seen.logits, Tensor) and seen.logits.ndim == 2):
            got = f"shape {tuple(seen.logits.shape)}" if isinstance(seen.logits, Tensor) else type(seen.logits).__name__
            raise ValueError(f"expected logits (B, C) from {name}, got {got}")
        self.num_classes: int = seen.logits.shape[1]
        self._undo.append(self.network.register_forward_hook(self._see_logits).remove)
        self._classifier = classifier_name(self.network, seen)
        if self._classifier is not None:
            last = self.network.get_submodule(self._classifier)
            self._undo.append(last.register_forward_pre_hook(self._see_pooled).remove)
        elif need_classifier and not (self._timm and _has_weights(self.network.get_classifier())):
            raise ValueError(
                f"expected a linear classifier whose output is the logits of {name}, got none; set network= to a "
                "classifier, or use SANM(place='energy') with network="
            )
        with nonzero_classifier(self.get_classifier()):
            if layer is not None:
                self._use(Place(layer, False))
                if not self._leads_to_logits(images, None):
                    raise ValueError(
                        f"expected logits of {name} that depend on the feature map, got none that depend on the output of "
                        f"the layer {layer!r}; set an earlier submodule with layer= (sanm_layer= of the mixin)"
                    )
            elif not (self._timm and self._timm_features_lead_to_logits(images)):
                self._timm = False
                self._find(seen.maps, images, other, need_map)
            self._describe(images)
        if self.hooked and not self.exact and self.pooled is not None:
            self.last_point = next((point for point, value in seen.points if _equal(value, self.pooled)), None)

    def _timm_features_lead_to_logits(self, images: Tensor) -> bool:
        inner = getattr(self.network, "_orig_mod", self.network)  # for compiled networks
        self.num_features: int = self.network.num_features
        self._plain_features = inner.forward_features
        release = shadow(inner, "forward_features", self._features_of)
        self._undo.append(release)
        with contextlib.suppress(ValueError):  # no map and no tokens
            if self._leads_to_logits(images, None):
                logits = self.forward_head(self.features)
                if _distance(logits_of(self.network(images)), logits) <= 1e-4 * float(logits.abs().max()):
                    return True
        self._undo.remove(release)
        release()
        return False

    def _find(self, places: list[Place], images: Tensor, other: Tensor, need_map: bool) -> None:
        for place in places:
            release = self._use(place)
            try:
                if self._leads_to_logits(images, other):
                    return
            except Exception as error:  # no grid of patches, or other shapes in another call of the submodule
                if is_out_of_memory(error):
                    raise
            self._undo.remove(release)
            release()
        self.place = None
        if need_map:
            height, width = images.shape[2:]
            raise ValueError(
                f"expected a feature map of more than one position, got 1 x 1 or none from which the logits of "
                f"{type(self.network).__name__} on images of {height} x {width} can be computed; set the submodule whose "
                "output is the last feature map with layer= (sanm_layer= of the mixin), use larger images, or place: "
                "random (--model.sanm.place random) with reconstruct: false"
            )

    def _use(self, place: Place) -> Callable[[], None]:
        """Take the feature map at ``place``, and return a function that undoes it."""
        module, self.place = self.network.get_submodule(place.name), place
        hook = (
            module.register_forward_pre_hook(self._see_input)
            if place.at_input
            else module.register_forward_hook(self._see_output)
        )
        self._undo.append(hook.remove)
        return self._undo[-1]

    def _leads_to_logits(self, images: Tensor, other: Tensor | None) -> bool:
        """Return whether the logits depend on the map and, with ``other`` images, on nothing else in the network."""
        self.exact = False
        features = self.forward_features(images)
        self.num_features = self.network.num_features if self._timm else channels_of(features, images.shape[2:]) or 0
        leaf = features if features.requires_grad else features.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.forward_head(leaf)
        if not depends(logits, leaf, lambda part: feature_map(part, self.num_features, images.shape[2:])):
            return False
        if other is None:
            return True
        kept, expected = features.detach().clone(), logits.detach().clone()
        differs = _distance(self._replay(kept, other), expected)
        return differs <= 0.01 * _distance(logits_of(self.network(other)), expected) and bool(expected.any())

    def _describe(self, images: Tensor) -> None:
        """Determine number of channels and exactness of the chosen map."""
        features = self.forward_features(images).detach()
        if self.pooled is not None:
            self.head_hidden_size = self.pooled[0].numel()
        if self._timm or self.place is not None:
            maps = feature_map(features, self.num_features, images.shape[2:])
            self.exact = is_pooled_linear(self, maps, self.forward_head(features).detach())
        else:
            self.num_features, self.exact = features.shape[1], True

    # Hooks are bound methods, not closures: a deep copy of the network then has hooks of the copied extractor.

    def _features_of(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self._plain_features(*args, **kwargs)
        self.features = features
        return features

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return self._at_map(output)

    def _see_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        replaced = self._at_map(inputs[0])
        return None if replaced is None else (replaced, *inputs[1:])

    def _at_map(self, features: Tensor) -> Tensor | None:
        """Store the feature map, and return what replaces it in the pass; None replaces nothing."""
        self.features = features
        if self._given is None and not self._recording:
            return None
        if self._given is None:
            self.features = features.detach().requires_grad_()
        else:
            self.features = self._given
        torch.set_grad_enabled(self._recording)  # until the end of the pass, see `_run`
        return self.features.clone()  # the next layer may operate in place

    def _see_logits(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.logits = logits_of(output)
        if self.place is None and not self._timm and inputs:
            self.features = inputs[0]

    def _see_pooled(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.pooled = inputs[0]

    # timm's interface

    def forward(self, images: Tensor) -> Any:
        """Return the output of the network for images (B, 3, H, W)."""
        return self.network(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of images (B, 3, H, W), in the network's layout.

        Without gradient, and if the head is not one linear layer after global pooling, the gradient of the logits with
        respect to the features is recorded nevertheless, in the head only: the features then require a gradient.
        """
        if self._timm:
            features: Tensor = self.network.forward_features(images)
            return features
        self.forget()
        if self.exact or torch.is_grad_enabled() or self.place is None:
            self.network(images)
        else:
            self._run(images, recording=True)
        if self.features is None:
            raise ValueError(
                f"expected {type(self.network).__name__} to run the layer of its last feature map, got no output of "
                "it; set another submodule with layer= (sanm_layer= of the mixin)"
            )
        return self.features

    def forward_head(self, features: Tensor | None, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, C) of features, or the input of the classifier with ``pre_logits``.

        Without timm's interface, the features of the last forward pass have stored logits. Others are given to the network
        in place of the features of black images, in evaluation mode, which takes another pass.
        """
        assert features is not None
        if self._timm:
            out: Tensor = self.network.forward_head(features, **({"pre_logits": True} if pre_logits else {}))
            return out
        if features is not self.features:
            self._replay(features)
        found = self.pooled if pre_logits else self.logits
        if found is None:
            raise ValueError(
                f"expected a linear classifier whose output is the logits of {type(self.network).__name__}, got none; use "
                "a network that ends in a linear layer"
            )
        return found if torch.is_grad_enabled() else found.detach()

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier; an identity if there is none."""
        if self._timm:
            classifier: nn.Module = self.network.get_classifier()
            return classifier
        return nn.Identity() if self._classifier is None else self.network.get_submodule(self._classifier)

    def _replay(self, features: Tensor, images: Tensor | None = None) -> Tensor:
        """Return the logits (B, C) of ``features`` given to the network in place of its feature map."""
        if self.place is None:
            self.network(features)
        else:
            if images is None:
                images = features.new_zeros(len(features), *self._image_shape)
            training = inference_context(self, images) if self.training else contextlib.nullcontext()
            recording = torch.is_grad_enabled()
            with training:
                self._given = features
                try:
                    self._run(images, recording)
                finally:
                    self._given = None
        self.features = features
        assert self.logits is not None
        return self.logits

    def _run(self, images: Tensor, recording: bool) -> None:
        """Run the network without gradient before the feature map, and with gradient after it if ``recording``."""
        self._recording = recording
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self.network(images)
        finally:
            self._recording = False

    def forget(self) -> None:
        """Delete the outputs of the last forward pass, and thereby its graph."""
        self.features = self.logits = self.pooled = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies, without the outputs of the last forward pass."""
        return {**self.__dict__, "features": None, "logits": None, "pooled": None}

    def remove(self) -> None:
        """Remove all hooks."""
        while self._undo:
            self._undo.pop()()
        self.forget()


def with_feature_map(network: nn.Module, image_size: Sequence[int], need_map: bool = True) -> Any:
    """Return a network with timm's interface whose logits are computed from its features: itself, or a wrapper of it.

    Args:
        network: classifier of images (B, 3, H, W) with logits (B, C); an encoder is not detected.
        image_size: H, W of the images in pixels.
        need_map: see :class:`FeatureExtractor`; False returns networks with timm's interface as they are.

    Raises:
        ValueError: see :class:`FeatureExtractor`.
    """
    if not need_map and all(hasattr(network, name) for name in ("forward_features", "forward_head")):
        return network
    extractor = FeatureExtractor(network, image_size, need_classifier=False, need_map=need_map)
    if not extractor.hooked:
        extractor.remove()
        return network
    return extractor


FeatureTap = FeatureExtractor
"""Alias for earlier imports."""


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of logits (B, C)."""
    return float((one.float() - other.float()).abs().max()) if one.shape == other.shape else float("inf")


def _equal(features: Tensor, pooled: Tensor) -> bool:
    """Return whether a map of one position has the values of the input of a classifier."""
    return features.numel() == pooled.numel() and torch.allclose(features.flatten(), pooled.flatten())


def _has_weights(classifier: Any) -> bool:
    """Return whether a classifier, or one of several, has weights; that of an encoder is an identity."""
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return any(True for part in parts for _ in part.parameters())


def shadow(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replace a method of an object, and return a function that restores it."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    return lambda: owner.__dict__.pop(name) and None if before is None else setattr(owner, name, before)
