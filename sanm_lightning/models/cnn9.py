"""The nine-layer network of Co-teaching."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from sanm_lightning.models.pooled import PooledClassifier, own_options

__all__ = ["CNN9", "cnn9"]


WIDTHS = ((128, 128, 128), (256, 256, 256), (512, 256, 128))
"""Number of channels of the convolutions of each group."""


class CNN9(PooledClassifier):
    """Nine 3 x 3 convolutions, each with batch norm and leaky ReLU, in three groups.

    Source: Co-teaching (Han et al., NeurIPS 2018), Table 2, and its code: 3 x 128, pool, 3 x 256, pool, then 512, 256,
    128 without padding; leaky slope .01, dropout .25 after each pool. On 32 x 32 images the last map is 2 x 2.
    Departure: dropout is active in training, as in the paper; in the released code (PyTorch 0.3), the functional call is
    never active. ``drop_rate`` 0 is the form of the code.

    Args:
        num_classes: C, number of classes.
        in_chans: number of input channels.
        drop_rate: probability of dropping a channel after each pool.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.25) -> None:
        super().__init__(WIDTHS[2][-1], num_classes)

        def group(inputs: int, *outputs: int, padding: int) -> list[nn.Module]:
            layers: list[nn.Module] = []
            for width in outputs:
                layers += [nn.Conv2d(inputs, width, 3, padding=padding), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
                inputs = width
            return layers

        self.layers = nn.Sequential(
            *group(in_chans, *WIDTHS[0], padding=1),
            nn.MaxPool2d(2),
            nn.Dropout2d(drop_rate),
            *group(WIDTHS[0][-1], *WIDTHS[1], padding=1),
            nn.MaxPool2d(2),
            nn.Dropout2d(drop_rate),
            *group(WIDTHS[1][-1], *WIDTHS[2], padding=0),
        )
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, 128, H / 4 - 6, W / 4 - 6) of images (B, 3, H, W), at least 28 x 28."""
        out: Tensor = self.layers(x)
        return out


@register_model
def cnn9(pretrained: bool = False, **kwargs: Any) -> CNN9:
    """Build Co-teaching's nine-layer network. There are no pre-trained weights."""
    return CNN9(**own_options("cnn9", pretrained, kwargs))
