"""The nine-layer network of Co-teaching."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

__all__ = ["CNN9", "cnn9"]


class CNN9(nn.Module):
    """Nine 3 x 3 convolutions, each with batch norm and leaky ReLU, in three groups.

    Source: Co-teaching (Han et al., NeurIPS 2018), Table 2, and its code: 3 x 128, pool, 3 x 256, pool, then 512, 256, 128
    without padding; leaky slope .01, dropout .25 after each pool. On 32 x 32 images the last map is 2 x 2.
    Departure: dropout is a module and thus off in evaluation; the released functional call would drop units there.

    Args:
        num_classes: C, number of classes.
        in_chans: input channels.
        drop_rate: probability of dropping a channel after each pool.
    """

    num_features = 128

    def __init__(self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.25) -> None:
        super().__init__()

        def group(inputs: int, *outputs: int, padding: int) -> list[nn.Module]:
            layers: list[nn.Module] = []
            for width in outputs:
                layers += [nn.Conv2d(inputs, width, 3, padding=padding), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
                inputs = width
            return layers

        self.num_classes = num_classes
        self.layers = nn.Sequential(
            *group(in_chans, 128, 128, 128, padding=1),
            nn.MaxPool2d(2),
            nn.Dropout2d(drop_rate),
            *group(128, 256, 256, 256, padding=1),
            nn.MaxPool2d(2),
            nn.Dropout2d(drop_rate),
            *group(256, 512, 256, 128, padding=0),
        )
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), at least 28 x 28 -> feature map (B, 128, H / 4 - 6, W / 4 - 6)."""
        out: Tensor = self.layers(x)
        return out

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, 128, h, w) -> logits (B, C), or, with ``pre_logits``, the pooled features (B, 128)."""
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
def cnn9(pretrained: bool = False, **kwargs: Any) -> CNN9:
    """Build Co-teaching's nine-layer network. There are no pre-trained weights."""
    if pretrained:
        raise ValueError("cnn9 has no pre-trained weights; leave pretrained out")
    timms_own = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what timm's factory passes to every model
    return CNN9(**{key: value for key, value in kwargs.items() if key not in timms_own})
