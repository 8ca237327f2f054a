"""Checks of a run under SANM before its first update."""

import weakref
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from sanm_lightning.compat import epochs_of_steps
from sanm_lightning.sanm.foreign_batch import images_and_labels
from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.rehearsal import own_streams

__all__ = [
    "LabelCheck",
    "check_images",
    "check_range",
    "check_rows",
    "height_and_width",
    "image_size_of",
    "is_reached",
    "require_owned",
    "require_parameters",
    "require_same_module",
    "require_unused",
    "require_whole_weights",
    "warn_of_few_steps",
    "warn_of_long_warmup",
]

SHARING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
"""Strategies that shard weights, by name, because lightning and pytorch_lightning have separate classes."""
TOLERANCE = 0.1
"""Distance of pixel values from [0, 1] that resampling and color changes may cause."""
MAX_VALUE = 10.0
"""Absolute pixel value, after the normalization is reversed, above which its statistics are those of another range."""
ROWS = 0.02
"""Distance from 1 of the sum of class probabilities; rows in bf16 sum to 1 up to 0.01."""
STATISTICS = (
    "pass the mean= and std= of their normalization to SANMCallback (sanm_mean= and sanm_std= to SANMMixin), so that masks and "
    "reconstruction are made in [0, 1], or mean=0 and std=1 for images that are not normalized"
)


def check_images(images: Tensor, sanm: SANM) -> None:
    """Check dtype, shape and range of the images of the first batch. It synchronizes with the device.

    Images that are outside of [0, 1] after the configured normalization is reversed cause a warning up to 10, and an error
    beyond.

    Args:
        images: shape (B, C, H, W).
        sanm: SANM with its decoder and the normalization of the images.

    Raises:
        MisconfigurationException: if the images are not floating, are outside of [0, 1] without a normalization, or the
            decoder or the normalization are those of other images, such as statistics of images from 0 to 255.
    """
    if not images.is_floating_point():
        raise MisconfigurationException(
            f"expected floating images in the batches for SANM, got {images.dtype}; convert them in the data set, such as "
            "image.float() / 255"
        )
    normalization, decoder = sanm.normalization, sanm.decoder
    if normalization is not None and normalization.channels not in (1, images.shape[1]):
        raise MisconfigurationException(
            f"expected mean and std for the {images.shape[1]} channels of the images, got {normalization.channels} values; "
            "pass one value per channel, or one for all"
        )
    built = None if decoder is None else (decoder.image_channels, *decoder.image_size)
    if built is not None and tuple(images.shape[1:]) != built:
        raise MisconfigurationException(
            f"expected images (C, H, W) = {built}, for which SANM was built, got {tuple(images.shape[1:])}; set image_size to "
            "the H, W of the training images"
        )
    if not (sanm.mask or sanm.reconstruct):
        return
    if normalization is None:
        check_range(images, STATISTICS)
    elif not normalization.is_identity:
        low, high = _range(normalization.denormalize(images))
        if not _in_unit_range(low, high):
            line = (
                f"expected images (x - mean) / std of x in [0, 1], got x from {low:.3g} to {high:.3g}; pass the mean and std "
                "of images in [0, 1], which are those of images from 0 to 255 divided by 255"
            )
            if max(-low, high) > MAX_VALUE:
                raise MisconfigurationException(line)
            rank_zero_warn(line)


def check_range(images: Tensor, advice: str) -> None:
    """Check that images are in [0, 1], with a tolerance of 0.1. It synchronizes with the device.

    Args:
        images: floating.
        advice: what to do, for the error message.

    Raises:
        MisconfigurationException: if a value is outside; NaN passes, because checks of the loss describe it.
    """
    low, high = _range(images)
    if not _in_unit_range(low, high):
        raise MisconfigurationException(
            f"expected images in [0, 1] in the batches, got {low:.3g} to {high:.3g}; {advice}"
        )


def _range(images: Tensor) -> tuple[float, float]:
    low, high = torch.stack([images.detach().min(), images.detach().max()]).tolist()
    return low, high


def _in_unit_range(low: float, high: float) -> bool:
    return not (low < -TOLERANCE or high > 1 + TOLERANCE)


def check_rows(labels: Tensor, owner: str) -> None:
    """Check that rows are class probabilities. It synchronizes with the device.

    Args:
        labels: shape (B, C), floating.
        owner: name for the error message.

    Raises:
        MisconfigurationException: if a row does not sum to 1, such as those of several classes per image.
    """
    sums = labels.float().sum(1)
    low, high = float(sums.min()), float(sums.max())
    if not 1 - ROWS <= low <= high <= 1 + ROWS:
        raise MisconfigurationException(
            f"expected class probabilities (B, C) whose rows sum to 1 for {owner}, got sums of {low:.3g} to {high:.3g}; use "
            "data with one class per image"
        )


class LabelCheck:
    """Check that targets are class probabilities, without synchronization except on the first batch."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None  # whether any row did not sum to 1 since the last report, on the device

    def __call__(self, targets: Tensor, labels: Tensor, now: bool = False) -> None:
        """Check targets (B, C), and the labels that they were converted from.

        Raises:
            MisconfigurationException: if a row does not sum to 1; on other devices than the CPU with ``now`` only.
        """
        bad = ((targets.float().sum(1) - 1).abs() > ROWS).any()
        if not now and bad.device.type != "cpu":
            self._bad = bad if self._bad is None else self._bad | bad
        elif bool(bad) and labels.ndim == 1:
            raise MisconfigurationException(
                f"expected class indices in [0, {targets.shape[1]}) for SANM, which estimates the quality of every label, got "
                f"{int(labels.min())} to {int(labels.max())}; remove samples without a class from the training set"
            )
        elif bool(bad):
            check_rows(labels, "SANM")

    def report(self, epoch: int) -> None:
        """Raise MisconfigurationException if a check on a device failed since the last report. It synchronizes."""
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise MisconfigurationException(
                "expected class indices in [0, C) or class probabilities whose rows sum to 1 for SANM, got other labels in "
                f"epoch {epoch}; remove these samples from the training set"
            )


def is_reached(trainer: L.Trainer, epoch: int) -> bool:
    """Return whether the epoch with this number, from 0, is within ``max_epochs``; True for ``fast_dev_run``."""
    limit = trainer.max_epochs
    return limit is None or limit < 0 or limit > epoch or bool(getattr(trainer, "fast_dev_run", False))


def warn_of_long_warmup(trainer: L.Trainer, first: int) -> None:
    """Warn if training ends before SANM's first mask, in epoch ``first``."""
    if not is_reached(trainer, first):
        rank_zero_warn(
            f"expected max_epochs above {first}, the number of epochs before SANM's first mask, got {trainer.max_epochs}, "
            "in which nothing is masked; raise max_epochs, or lower warmup_epochs"
        )


def warn_of_few_steps(trainer: L.Trainer, first: int) -> None:
    """Warn if ``max_steps`` end the training before SANM's first mask, in epoch ``first``; in ``on_train_start``."""
    if epochs_of_steps(trainer) <= first and is_reached(trainer, first):
        rank_zero_warn(
            f"expected max_steps beyond the first {first} epochs, before SANM's first mask, got {trainer.max_steps}, in which "
            "nothing is masked; raise max_steps, or lower warmup_epochs"
        )


def require_whole_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Raise MisconfigurationException for strategies that shard weights.

    Activation maps read the classifier's weights outside of the wrapped forward, submodules run separately, and methods
    rank or average single weights, which fails late or silently with sharded weights.
    """
    if SHARING & {kind.__name__ for kind in type(trainer.strategy).__mro__}:
        raise MisconfigurationException(
            f"expected a strategy without sharded weights for {type(pl_module).__name__}, got "
            f"{type(trainer.strategy).__name__}; use --trainer.strategy ddp"
        )


def image_size_of(trainer: L.Trainer) -> tuple[int, int]:
    """Return H, W of the images of a batch, which is read before training.

    Raises:
        MisconfigurationException: if there is no batch of images.
    """
    try:
        with own_streams():  # loaders and data sets may use the global stream
            batch = next(iter(trainer.fit_loop._data_source.dataloader()))
    except Exception as error:
        raise MisconfigurationException(
            f"expected a batch before training to determine the image size for SANM, got {type(error).__name__}: "
            f"{error}; pass image_size="
        ) from error
    height, width = images_and_labels(batch)[0].shape[-2:]
    return height, width


def require_parameters(pl_module: L.LightningModule) -> None:
    """Raise MisconfigurationException for a module without parameters, whose network is created after SANM is set up."""
    if next(pl_module.parameters(), None) is None:  # callbacks are set up before setup() and configure_model()
        raise MisconfigurationException(
            f"expected a network that {type(pl_module).__name__} creates in its constructor, got no parameters when SANM is "
            "set up; create the network in __init__, not in setup() or configure_model()"
        )


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return H, W of an image size, one number for square images.

    Raises:
        MisconfigurationException: if there are other than one or two numbers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise MisconfigurationException(
            f"expected an image size of one number or (H, W) for SANM, got {sides}; set image_size= (sanm_image_size= of the "
            "mixin)"
        )
    return sides


def require_unused(sanm: SANM) -> None:
    """Raise ValueError for a SANM that is built for the network of another module."""
    _require_sole(sanm.built, "is built for a network")


def require_owned(sanm: SANM, owner: object) -> None:
    """Raise ValueError for a SANM with which another module was created after that of ``owner``."""
    _require_sole(sanm.owner not in (None, owner), "was given to another module as well")


_MODULES: "weakref.WeakKeyDictionary[SANM, weakref.ref[L.LightningModule]]" = weakref.WeakKeyDictionary()
"""The last module that was trained with each SANM of a callback; modules and checkpoints do not contain it."""


def require_same_module(sanm: SANM, pl_module: L.LightningModule, resumed: bool) -> None:
    """Raise ValueError for a new run of another module, which would start with decoder and evidence of the first one."""
    before = _MODULES.get(sanm)
    _require_sole(before is not None and before() is not pl_module and not resumed, "was trained with another module")
    _MODULES[sanm] = weakref.ref(pl_module)


def _require_sole(shared: bool, got: str) -> None:
    if shared:
        raise ValueError(
            f"expected a SANM that no other module uses, got one that {got}; create a SANM for each module"
        )
