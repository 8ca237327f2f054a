"""Check the first batch of a loader that is not one of this package."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.models.normalized import Normalized
from sanm_lightning.sanm.checks import check_range, check_rows

__all__ = ["FirstBatch"]


class FirstBatch(L.Callback):
    """Check images and labels of the first batch of training, validation, test and prediction, once per call.

    It synchronizes with the device in that batch only.

    Raises:
        MisconfigurationException: before the first update, if images are neither in uint8 nor floating point; if they are not
            in [0, 1], such as those of a loader that normalizes them; if their size is not the ``image_size`` of a method
            under SANM; or if labels are neither class indices nor class probabilities.
    """

    def __init__(self) -> None:
        self._checked: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the batches of earlier calls."""
        self._checked.clear()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Check a batch of the training set."""
        if self._is_first("train"):
            read = NoisyBatch.from_any(batch)
            _check_images(pl_module, read.images)
            _check_size(pl_module, read.images)
            _check_labels(pl_module, read.labels)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check a batch of each validation set."""
        if self._is_first(f"validation {dataloader_idx}"):
            _check_images(pl_module, NoisyBatch.from_any(batch).images)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check a batch of each test set."""
        if self._is_first(f"test {dataloader_idx}"):
            _check_images(pl_module, NoisyBatch.from_any(batch).images)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check a batch of each set to predict."""
        if self._is_first(f"predict {dataloader_idx}"):
            _check_images(pl_module, NoisyBatch.from_any(batch, need_labels=False).images)

    def _is_first(self, name: str) -> bool:
        first = name not in self._checked
        self._checked.add(name)
        return first


def _check_images(module: Any, images: Tensor) -> None:
    """Check dtype and range of images (B, C, H, W); the range unless neither network nor SANM relies on it."""
    if images.ndim != 4:
        return  # the step raises the error
    if not images.is_floating_point():
        raise MisconfigurationException(
            f"expected images in uint8 or floating point in the batches, got {images.dtype}; convert them in the data set, "
            "such as image.float() / 65535"
        )
    if module.sanm.enabled or any(map(_normalizes, module.networks)):
        name = type(module).__name__
        check_range(images, f"{name} normalizes its images: remove the normalization from the loader of {name}")


def _normalizes(network: Any) -> bool:
    inner = getattr(network, "_orig_mod", network)  # of a compiled network
    if not isinstance(inner, Normalized):
        return False
    return bool((inner.mean != 0).any()) or bool((inner.std != 1).any())


def _check_size(module: Any, images: Tensor) -> None:
    """Check the images of a method under SANM, whose decoder has the size of ``image_size``."""
    decoder = module.sanm.decoder
    if decoder is not None and images.shape[2:] != decoder.image_size:
        expected, size = "{} x {}".format(*decoder.image_size), "{} x {}".format(*images.shape[2:])
        raise MisconfigurationException(
            f"expected images of {expected} pixels, the image_size of {type(module).__name__}, got {size}; pass "
            f"image_size={tuple(images.shape[2:])}"
        )


def _check_labels(module: Any, labels: Tensor) -> None:
    """Check class indices (B,) or probabilities (B, C)."""
    name, classes = type(module).__name__, module.num_classes
    if labels.ndim == 2 and labels.shape[1] == classes and labels.is_floating_point():
        check_rows(labels, name)
    elif labels.ndim == 1 and not labels.is_floating_point():
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise MisconfigurationException(
                f"expected class indices in [0, {classes}), the num_classes of {name}, got {int(labels.min())} to "
                f"{int(labels.max())}; set num_classes, and remove samples without a class"
            )
    else:
        raise MisconfigurationException(
            f"expected labels (B,) of class indices or (B, {classes}) of class probabilities for {name}, got "
            f"{tuple(labels.shape)} of {labels.dtype}; convert them in the data set"
        )
