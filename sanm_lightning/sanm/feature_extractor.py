"""Feature map, logits and classifier of networks without timm's interface."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.sanm.activation import classifier_weight
from sanm_lightning.sanm.inference import inference_context, input_channels

__all__ = ["FeatureExtractor", "FeatureTap", "shadow"]


class FeatureExtractor(nn.Module):
    """Wrapper of a convolutional classifier with timm's interface that stores the features of its last forward pass.

    The features of a timm model are those of ``forward_features``. For other networks (torchvision, custom), they are
    the input of the last average pooling, or the output of a given layer; ``forward_features`` then runs the whole
    network and stores the logits for ``forward_head``. The constructor runs the network once, on two black images.

    Args:
        network: classifier of images (B, 3, H, W) with logits (B, C).
        image_size: H, W of the images in pixels.
        layer: name of the submodule whose output is the last feature map; None detects it.
        need_classifier: whether a linear classifier on the pooled features is required.

    Raises:
        ValueError: if no feature map or no linear classifier is found, or the network fails on the images.
    """

    features: Tensor | None = None
    logits: Tensor | None = None

    def __init__(
        self, network: nn.Module, image_size: Sequence[int], layer: str | None = None, need_classifier: bool = True
    ) -> None:
        super().__init__()
        self.network: Any = network
        self._undo: list[Callable[[], None]] = []
        timm_names = ("forward_features", "forward_head", "get_classifier", "num_features")
        self._timm = layer is None and all(hasattr(network, name) for name in timm_names)
        like = next(network.parameters(), torch.zeros(()))
        images = torch.zeros(2, input_channels(network), *image_size, device=like.device, dtype=like.dtype)
        try:
            self._listen(layer)
            with inference_context(self, images):
                features = self.forward_features(images)
                logits = self.forward_head(features)
            if not (isinstance(logits, Tensor) and logits.ndim == 2):
                got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"expected logits (B, C) from {type(network).__name__}, got {got}")
            self.num_classes: int = logits.shape[1]
            self.num_features: int = network.num_features if self._timm else features.shape[1]  # type: ignore[assignment]
            if need_classifier:
                classifier_weight(self if not self._timm else network, self.num_features)  # type: ignore[arg-type]
        except Exception as error:
            self.remove()
            if isinstance(error, ValueError):
                raise
            name, shape = type(network).__name__, tuple(images.shape)
            raise ValueError(
                f"expected {name} to accept images {shape}, got {type(error).__name__}: {error}"
            ) from error
        self.forget()

    def _listen(self, layer: str | None) -> None:
        network = self.network
        if self._timm:
            inner = getattr(network, "_orig_mod", network)  # for compiled networks
            self._plain_features = inner.forward_features
            self._undo.append(shadow(inner, "forward_features", self._features_of))
        elif layer is not None:
            try:
                self._undo.append(network.get_submodule(layer).register_forward_hook(self._see_output).remove)
            except AttributeError:
                raise ValueError(
                    f"expected a layer {layer!r} in {type(network).__name__}, got no such submodule; check layer="
                ) from None
        else:
            pools = [m for m in network.modules() if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))]
            if not pools:
                raise ValueError(
                    f"expected average pooling in {type(network).__name__} after the last feature map, got none; set "
                    "the submodule whose output is the last feature map with layer="
                )
            self._undo.append(pools[-1].register_forward_pre_hook(self._see_input).remove)
        self._undo.append(network.register_forward_hook(self._see_logits).remove)

    # Bound methods, not closures: a deep copy of the network then has hooks of the copied extractor.

    def _features_of(self, *args: Any, **kwargs: Any) -> Tensor:
        features: Tensor = self._plain_features(*args, **kwargs)
        self.features = features
        return features

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features = output

    def _see_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def _see_logits(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.logits = output

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w) of images (B, 3, H, W)."""
        if self._timm:
            features: Tensor = self.network.forward_features(images)
            return features
        self.forget()
        self.network(images)
        if self.features is None:
            raise ValueError(
                f"expected {type(self.network).__name__} to run the layer of its last feature map, got no output of "
                "it; set another submodule with layer="
            )
        return self.features

    def forward_head(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of a feature map (B, D, h, w); without timm's interface, of the last one only."""
        logits = self.network.forward_head(features) if self._timm else self.logits
        assert logits is not None
        return logits

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        if self._timm:
            classifier: nn.Module = self.network.get_classifier()
            return classifier
        shape = (self.num_classes, self.num_features)
        linear = [m for m in self.network.modules() if isinstance(m, nn.Linear) and tuple(m.weight.shape) == shape]
        if not linear:
            raise ValueError(
                f"expected a linear classifier from the {shape[1]} channels of the last feature map to {shape[0]} "
                f"classes in {type(self.network).__name__} for a class activation map, got none; use "
                "SANM(place='energy')"
            )
        return linear[-1]

    def forget(self) -> None:
        """Delete the outputs of the last forward pass, and thereby its graph."""
        self.features = self.logits = None

    def remove(self) -> None:
        """Remove all hooks."""
        while self._undo:
            self._undo.pop()()
        self.forget()


FeatureTap = FeatureExtractor
"""Alias for earlier imports."""


def shadow(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replace a method of an object, and return a function that restores it."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    return lambda: owner.__dict__.pop(name) and None if before is None else setattr(owner, name, before)
