"""Reconstruction of the image from the features of the masked image (SANM, Eq. 9 and 10)."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Decoder", "reconstruction_loss"]


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared error over all elements, in float32 or better.

    Source: SANM (Tu et al., CVPR 2023), Eq. 10.
    Departure: the equation sums over the elements of an image; here, as in the released code, it is the mean, so that the
    weight beta does not depend on the image size.

    Args:
        reconstruction: shape (B, C, H, W).
        images: the unmasked images, same shape.

    Returns:
        A scalar, >= 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"expected a reconstruction of the images' shape {tuple(images.shape)}, got {tuple(reconstruction.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, images.dtype), torch.float32)
    return F.mse_loss(reconstruction.to(dtype), images.to(dtype))


class Decoder(nn.Module):
    """Linear decoder from a feature map to an image: transposed convolutions that each double height and width.

    Source: the decoder of the released code has three transposed convolutions without activation or normalization
    (512-256-128-3 from 4 x 4 to 32 x 32). Departure: every stage has kernel 4, stride 2 and padding 1, which doubles
    the size exactly and supports any feature map and image size; remaining differences are resized with bilinear
    interpolation. On CIFAR, it requires 69 million multiplications per image instead of 153.

    Args:
        channels: D, number of channels of the feature map.
        map_size: h, w of the feature map.
        image_size: H, W of the images in pixels.
        seed: seed of the initial weights, which use a separate stream: the weights of networks created afterwards do
            not depend on the decoder.
        image_channels: C, number of channels of the images.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        channels: int,
        map_size: tuple[int, int],
        image_size: tuple[int, int],
        seed: int = 0,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if min(channels, *map_size, *image_size, image_channels) < 1:
            raise ValueError(f"expected positive sizes, got channels {channels}, map {map_size}, image {image_size}")
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.image_channels = image_channels
        self.shape = (channels, int(map_size[0]), int(map_size[1]))
        growth = max(image_size[0] / map_size[0], image_size[1] / map_size[1])
        doublings = max(0, math.ceil(math.log2(growth)))
        widths = [
            channels,
            *(max(16, min(channels // 2, 256) >> stage) for stage in range(doublings - 1)),
            image_channels,
        ]
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators, permanently
            self.layers = nn.Sequential(
                *(nn.ConvTranspose2d(i, o, 4, stride=2, padding=1) for i, o in pairwise(widths))
                if doublings
                else [nn.Conv2d(channels, image_channels, 3, padding=1)]
            )

    @property
    def sizes(self) -> list[Any]:
        """Shape (D, h, w) of the feature map, (H, W) and C of the images, as built-in types."""
        return [list(self.shape), list(self.image_size), self.image_channels]

    def check_channels(self, channels: int, image_channels: int) -> None:
        """Raise ValueError if a feature map or its images have other numbers of channels than the decoder."""
        if (channels, image_channels) != (self.shape[0], self.image_channels):
            raise ValueError(
                f"expected a network with {self.shape[0]} channels in its feature map and {self.image_channels} in its images, "
                f"for which this SANM was created, got {channels} and {image_channels}; create a SANM for each network"
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return reconstructed images (B, C, H, W), unbounded, of feature maps (B, D, h, w)."""
        image: Tensor = self.layers(features)
        if image.shape[2:] != self.image_size:
            image = image.to(torch.promote_types(image.dtype, torch.float32))
            image = F.interpolate(image, size=self.image_size, mode="bilinear", align_corners=False)
        return image
