"""Colored blobs: a synthetic data set for tests and for checks of a configuration within a second."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source
from sanm_lightning.random_streams import named_generator

__all__ = ["Toy"]


class Toy(NoisyDataModule):
    """Blobs on a noisy background, with a color and a position per class. Generated in memory from the seed.

    Args:
        num_samples: number of training images, with balanced classes.
        num_classes: C, number of classes.
        image_size: side of the square images in pixels.
        num_test_samples: number of test images.
        batch_size: training samples per step and process.
        crop_padding: pixels of zero padding for random crops in training; 0 disables crops.
        flip: whether to flip training images horizontally at random.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if a number is smaller than 1.
    """

    def __init__(
        self,
        num_samples: int = 64,
        num_classes: int = 4,
        image_size: int = 16,
        num_test_samples: int = 32,
        batch_size: int = 16,
        crop_padding: int = 1,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, crop_padding=crop_padding, flip=flip, **kwargs)
        if min(num_samples, num_classes, image_size, num_test_samples) < 1:
            raise ValueError(
                "expected num_samples, num_classes, image_size and num_test_samples of 1 or more, got "
                f"{num_samples}, {num_classes}, {image_size} and {num_test_samples}; choose larger numbers"
            )
        self._sizes = num_samples, num_test_samples
        self._num_classes = num_classes
        self._side = image_size

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) in pixels."""
        return self._side, self._side

    def load_train(self) -> Source:
        """Return ``num_samples`` images."""
        return self._blobs(self._sizes[0], named_generator("toy", self.seed, 0))

    def load_test(self) -> Source:
        """Return ``num_test_samples`` images."""
        return self._blobs(self._sizes[1], named_generator("toy", self.seed, 1))

    def _blobs(self, size: int, generator: torch.Generator) -> Source:
        looks = named_generator("toy", self.seed, 2)  # colors and positions, the same for training and test images
        colors = torch.rand(self._num_classes, 3, 1, 1, generator=looks)
        places = torch.rand(self._num_classes, 2, generator=looks) * 0.6 + 0.2
        labels = torch.arange(size) % self._num_classes
        jitter = (torch.rand(size, 2, generator=generator) - 0.5) * 0.1
        blob = _bump(places[labels] + jitter, self._side)
        ground = torch.rand(size, 3, self._side, self._side, generator=generator) * 0.4 + 0.3
        images = ground + blob * (colors[labels] - ground)
        return Source(labels, (images * 255).round().to(torch.uint8))


def _bump(places: Tensor, side: int) -> Tensor:
    """Return Gaussian bumps of height 1 at places (N, 2), in fractions of the side, shape (N, 1, side, side)."""
    pixel = (torch.arange(side) + 0.5) / side
    row = (pixel - places[:, :1]).square().view(-1, 1, side, 1)
    column = (pixel - places[:, 1:]).square().view(-1, 1, 1, side)
    return torch.exp(-(row + column) / (2 * 0.15**2))
