"""A small convolutional network for small images, which trains in seconds on a CPU."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from sanm_lightning.models.pooled import PooledClassifier, own_options

__all__ = ["SmallCNN", "small_cnn"]


class SmallCNN(PooledClassifier):
    """Four 3 x 3 convolutions with batch norm and ReLU, two of stride 2, and one linear layer; not from a paper.

    Args:
        num_classes: C, number of classes.
        in_chans: number of input channels.
        width: number of channels of the first convolution; the others have 2, 2 and 4 times as many.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 16) -> None:
        super().__init__(4 * width, num_classes)
        layers: list[nn.Module] = []
        inputs = in_chans
        for outputs, stride in ((width, 2), (2 * width, 2), (2 * width, 1), (4 * width, 1)):
            conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the feature map (B, 4 width, H / 4, W / 4) of images (B, 3, H, W)."""
        out: Tensor = self.layers(x)
        return out


@register_model
def small_cnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """Build the small network; ``width`` scales it. There are no pre-trained weights."""
    return SmallCNN(**own_options("small_cnn", pretrained, kwargs))
