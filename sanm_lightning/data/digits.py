"""Handwritten digits that come with scikit-learn: small, real, and never downloaded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source

__all__ = ["Digits"]

TEST_SAMPLES = 500


class Digits(NoisyDataModule):
    """The 1,797 handwritten digits of scikit-learn, 10 classes: 1,297 for training and 500 for testing.

    The 8 x 8 grey images are enlarged bilinearly and repeated in three channels. The split into training and test set is
    random but fixed: it is the same for every seed. A digit is another one when it is mirrored, and fills its frame, so
    there are neither flips nor crops by default.

    Args:
        root: not used, nothing is read from a folder.
        image_size: side of the square images in pixels; 16 costs a quarter of the default.
        batch_size: training samples per step and process.
        crop_padding: pixels of zero padding for random crops in training; 0 for no crops.
        flip: whether training images are mirrored at random.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: image_size is smaller than 8, the size of the originals.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        batch_size: int = 64,
        crop_padding: int = 0,
        flip: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, batch_size=batch_size, crop_padding=crop_padding, flip=flip, **kwargs)
        if image_size < 8:
            raise ValueError(f"image_size must be 8 pixels or more, the size of the originals, got {image_size}.")
        self._side = image_size

    @property
    def num_classes(self) -> int:
        """10."""
        return 10

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) pixels."""
        return self._side, self._side

    def load_train(self) -> Source:
        """1,297 digits."""
        images, labels, order = _digits(self._side)
        return Source(labels[order[TEST_SAMPLES:]], images[order[TEST_SAMPLES:]])

    def load_test(self) -> Source:
        """500 digits."""
        images, labels, order = _digits(self._side)
        return Source(labels[order[:TEST_SAMPLES]], images[order[:TEST_SAMPLES]])


def _digits(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """All images, uint8, all labels, and the fixed order in which the first are the test set."""
    from sklearn.datasets import load_digits  # slow to import, and needed by this data set only

    data = load_digits()
    grey = torch.from_numpy(data.images).float().unsqueeze(1) * (255 / 16)  # scikit-learn counts in 0 to 16
    grey = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
    images = grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images, torch.from_numpy(data.target).long(), order
