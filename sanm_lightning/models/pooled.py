"""What the networks of this package share: global average pooling and one linear classifier, by timm's conventions."""

from typing import Any

from torch import Tensor, nn

__all__ = ["PooledClassifier", "own_options"]


class PooledClassifier(nn.Module):
    """A network whose logits are one linear map of its averaged last feature map, so that its class activation map is exact.

    A subclass gives ``forward_features``.

    Args:
        num_features: D, channels of the last feature map.
        num_classes: C, number of classes.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features, self.num_classes = num_features, num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> feature map (B, D, h, w)."""
        raise TypeError(f"{type(self).__name__} has to define forward_features")

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C), or, with ``pre_logits``, the pooled features (B, D)."""
        pooled = features.mean(dim=(2, 3))
        out: Tensor = pooled if pre_logits else self.fc(pooled)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for ``num_classes``; 0 for none."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(x))


def own_options(name: str, pretrained: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a network of ours: without what timm's factory hands to every model.

    Raises:
        ValueError: if pre-trained weights are asked for; there are none.
    """
    if pretrained:
        raise ValueError(f"{name} has no pre-trained weights; leave pretrained out")
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in of_timm}
