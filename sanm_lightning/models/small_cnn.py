"""A small plain network for small images, that a CPU trains in seconds."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

__all__ = ["SmallCNN", "small_cnn"]


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with batch norm and ReLU, two of stride 2, and one linear layer. Ours, of no paper.

    Args:
        num_classes: C, number of classes.
        in_chans: input channels.
        width: channels of the first convolution; the following have 2, 2 and 4 times as many.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 16) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 4 * width
        layers: list[nn.Module] = []
        inputs = in_chans
        for outputs, stride in ((width, 2), (2 * width, 2), (2 * width, 1), (4 * width, 1)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> feature map (B, 4 width, H / 4, W / 4)."""
        out: Tensor = self.layers(x)
        return out

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, D, h, w) -> logits (B, C), or, with ``pre_logits``, the pooled features (B, D)."""
        pooled = features.mean(dim=(2, 3))
        out: Tensor = pooled if pre_logits else self.fc(pooled)
        return out

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for ``num_classes``."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(x))


@register_model
def small_cnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """Build the small network; ``width`` scales it. There are no pre-trained weights."""
    if pretrained:
        raise ValueError("small_cnn has no pre-trained weights; leave pretrained out")
    ours = {
        key: value
        for key, value in kwargs.items()
        if key not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    }
    return SmallCNN(**ours)
