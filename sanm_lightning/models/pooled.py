"""Base class of networks with global average pooling and one linear classifier, with timm's interface."""

from typing import Any

from torch import Tensor, nn

__all__ = ["PooledClassifier", "own_options", "pooled_features", "pooled_width"]


class PooledClassifier(nn.Module):
    """Network with a linear classifier on the averaged last feature map, so that its class activation map is exact.

    A subclass defines ``forward_features``.

    Args:
        num_features: D, number of channels of the last feature map.
        num_classes: C, number of classes.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, D, h, w) of images (B, 3, H, W)."""
        raise TypeError(f"expected {type(self).__name__} to define forward_features, got no such method; add it")

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, C) of a feature map (B, D, h, w), or the pooled features (B, D) with ``pre_logits``."""
        pooled = features.mean(dim=(2, 3))
        out: Tensor = pooled if pre_logits else self.fc(pooled)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes``; 0 removes it."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


def pooled_width(network: Any) -> int:
    """Return the number of features that ``forward_head(..., pre_logits=True)`` of a network with timm's interface returns.

    It differs from the channels of the feature map in networks with a hidden layer after the pooling, such as MobileNetV3.
    """
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def pooled_features(network: Any, maps: Tensor) -> Tensor:
    """Return the input (B, D) of the classifier of a network with timm's interface, from feature maps (B, D', h, w)."""
    features: Tensor = network.forward_head(maps, pre_logits=True)
    return features


def own_options(name: str, pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a network of this package, without those that timm's factory adds for every model.

    Raises:
        ValueError: if pre-trained weights are requested; there are none.
    """
    if pretrained:
        raise ValueError(
            f"expected no pretrained for {name}, which has no pre-trained weights, got true; omit pretrained"
        )
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in of_timm}
