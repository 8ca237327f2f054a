"""Handwritten digits included in scikit-learn, which need no download."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sanm_lightning.data.datamodule import NoisyDataModule, Source

__all__ = ["Digits"]

TEST_SAMPLES = 500


class Digits(NoisyDataModule):
    """The 1,797 handwritten digits of scikit-learn, 10 classes: 1,297 for training and 500 for testing.

    The 8 x 8 gray images are resized with bilinear interpolation and repeated in three channels. The split into
    training and test set is random but fixed, that is, independent of the seed. Flips change the digit, and digits fill
    the image, so flips and crops are disabled by default.

    Args:
        root: unused; no files are read.
        image_size: side of the square images in pixels; 16 costs a quarter of the default.
        batch_size: training samples per step and process.
        crop_padding: pixels of zero padding for random crops in training; 0 disables crops.
        flip: whether to flip training images horizontally at random.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 8, the size of the original images.
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
            raise ValueError(
                f"expected image_size of 8 pixels, the size of the original images, or more, got {image_size}; choose "
                "a larger one, such as 32"
            )
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
        """Return 1,297 digits."""
        images, labels, order = _digits(self._side)
        return Source(labels[order[TEST_SAMPLES:]], images[order[TEST_SAMPLES:]])

    def load_test(self) -> Source:
        """Return 500 digits."""
        images, labels, order = _digits(self._side)
        return Source(labels[order[:TEST_SAMPLES]], images[order[:TEST_SAMPLES]])


def _digits(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all images, uint8, all labels, and a fixed permutation whose first entries are the test set."""
    from sklearn.datasets import load_digits  # slow to import and used by this data set only

    data = load_digits()
    gray = torch.from_numpy(data.images).float().unsqueeze(1) * (255 / 16)  # scikit-learn's values are 0 to 16
    gray = F.interpolate(gray, size=(side, side), mode="bilinear", align_corners=False)
    images = gray.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images, torch.from_numpy(data.target).long(), order
