"""Feature map, logits and classifier of networks that do not follow timm's conventions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.sanm.activation import classifier_weight
from sanm_lightning.sanm.inference import inference_context

__all__ = ["FeatureExtractor", "FeatureTap", "shadow"]


class FeatureExtractor(nn.Module):
    """Any convolutional classifier by timm's conventions, with the features of its last forward.

    The features of a timm model are those of ``forward_features``. Of another network (torchvision's, one's own) the map that
    enters the last average pooling is taken, or the output of a named layer; then ``forward_features`` runs the whole network
    and keeps the logits for ``forward_head``. The network is run once here, on two black images.

    Args:
        network: the classifier, images (B, 3, H, W) -> logits (B, C).
        image_size: H, W of the images in pixels.
        layer: name of the submodule whose output is the last feature map; None finds it.
        need_classifier: insist on a linear classifier on the pooled features.

    Raises:
        ValueError: if no feature map or no linear classifier can be found, or the network does not run.
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
        images = torch.zeros(2, 3, *image_size, device=like.device, dtype=like.dtype)
        try:
            self._listen(layer)
            with inference_context(self, images):
                features = self.forward_features(images)
                logits = self.forward_head(features)
            if not (isinstance(logits, Tensor) and logits.ndim == 2):
                raise ValueError(f"{type(network).__name__} does not yield logits (B, C)")
            self.num_classes: int = logits.shape[1]
            self.num_features: int = network.num_features if self._timm else features.shape[1]  # type: ignore[assignment]
            if need_classifier:
                classifier_weight(self if not self._timm else network, self.num_features)  # type: ignore[arg-type]
        except Exception as error:
            self.remove()
            if isinstance(error, ValueError):
                raise
            name, shape = type(network).__name__, tuple(images.shape)
            raise ValueError(f"{name} does not run on images {shape} ({type(error).__name__}: {error})") from error
        self.forget()

    def _listen(self, layer: str | None) -> None:
        network = self.network
        if self._timm:
            inner = getattr(network, "_orig_mod", network)  # of a compiled one
            self._plain_features = inner.forward_features
            self._undo.append(shadow(inner, "forward_features", self._features_of))
        elif layer is not None:
            try:
                self._undo.append(network.get_submodule(layer).register_forward_hook(self._see_output).remove)
            except AttributeError:
                raise ValueError(f"{type(network).__name__} has no layer {layer!r}") from None
        else:
            pools = [m for m in network.modules() if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AvgPool2d))]
            if not pools:
                raise ValueError(
                    f"{type(network).__name__} has no average pooling to take a feature map from, so the layer whose output "
                    "is the last feature map must be named with layer="
                )
            self._undo.append(pools[-1].register_forward_pre_hook(self._see_input).remove)
        self._undo.append(network.register_forward_hook(self._see_logits).remove)

    # Bound methods, not closures: in a deep copy of the network they belong to the copy.

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
        """Images (B, 3, H, W) -> feature map (B, D, h, w)."""
        if self._timm:
            features: Tensor = self.network.forward_features(images)
            return features
        self.forget()
        self.network(images)
        if self.features is None:
            raise ValueError(f"{type(self.network).__name__} does not run the layer that yields its last feature map")
        return self.features

    def forward_head(self, features: Tensor) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C); of a network that is not timm's, the last feature map only."""
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
                f"{type(self.network).__name__} has no linear classifier from the {shape[1]} channels of its last feature "
                f"map to {shape[0]} classes, as a class activation map needs it (SANM(place='energy') does not)"
            )
        return linear[-1]

    def forget(self) -> None:
        """Let go of the last forward, and of its graph."""
        self.features = self.logits = None

    def remove(self) -> None:
        """Take every hook off again."""
        while self._undo:
            self._undo.pop()()
        self.forget()


FeatureTap = FeatureExtractor
"""Earlier name."""


def shadow(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replace a method of one object, and return a function that undoes it."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    return lambda: owner.__dict__.pop(name) and None if before is None else setattr(owner, name, before)
