"""Base class of data sets whose images are decoded on access to squares of one size."""

from abc import abstractmethod
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from sanm_lightning.data.datamodule import NoisyDataModule
from sanm_lightning.data.decode import Resize, check_decoding
from sanm_lightning.data.left_out import leave_out, unreadable_rows
from sanm_lightning.data.source import Source

__all__ = ["SquareImages"]


class SquareImages(NoisyDataModule):
    """Base class of data sets of images of any size and mode, which are decoded on access.

    Images are rotated according to EXIF, resized to ``decode_size``, and become squares as ``resize`` says; without an
    alpha channel, transparent images are composited on white. Of animations, the first frame is read. Values of 16 bits
    are scaled to 8 bits. Views of ``image_size`` are random crops of that square in training and center crops in
    evaluation.

    Args:
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        channels: number of channels: 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
        resize: ``crop`` resizes the short side to ``decode_size`` and crops the center; ``stretch`` resizes both sides.
        on_error: ``raise`` raises an error when an image cannot be decoded. ``skip`` decodes every image when the data
            are loaded, with ``num_workers`` processes, and leaves out those that cannot be decoded, before subset, noise
            and split; their number and names are logged.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1, decode_size is smaller than image_size, or channels, resize or
            on_error is none of the above.
    """

    def __init__(
        self,
        image_size: int = 224,
        decode_size: int | None = None,
        channels: int = 3,
        resize: Resize = "crop",
        on_error: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(
                f"expected image_size of 1 pixel or more, got {image_size}; choose a larger one, such as 224"
            )
        if decode_size is not None and decode_size < image_size:
            raise ValueError(
                f"expected decode_size of {image_size}, the image_size, or more, got {decode_size}; choose a larger one"
            )
        check_decoding(channels, resize)
        if on_error not in ("raise", "skip"):
            raise ValueError(f"expected on_error 'raise' or 'skip', got {on_error!r}; choose one of them")
        self._side = image_size
        self._decoded = image_size if decode_size is None else decode_size
        self.channels = channels
        self.resize: Resize = resize
        self.on_error = on_error

    @property
    def num_classes(self) -> int:
        """The number of class names."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(side, side) in pixels."""
        return self._side, self._side

    @property
    def decode_size(self) -> tuple[int, int]:
        """(side, side) of the decoded squares in pixels."""
        return self._decoded, self._decoded

    @property
    def curated(self) -> bool:
        """False: the given labels may be wrong."""
        return False

    @abstractmethod
    def complete_source(self, split: str) -> Source:
        """Return the images of ``train``, ``val`` or ``test``, including those that cannot be decoded."""

    def known_bad(self, source: Source) -> dict[int, str]:
        """Return the rows of a source that are known to be bad, with reasons."""
        return {}

    def source(self, split: str) -> Source:
        """Return the images of ``train``, ``val`` or ``test``, without those that are left out as bad; name absent classes."""
        source = self.complete_source(split)
        bad = self.known_bad(source)
        if self.on_error == "skip":
            bad |= unreadable_rows(source.images, self.num_workers, known=bad)
        source = leave_out(source, bad, self.class_names, split, self._say)
        if split != "train" and (empty := self.classes_without(source.labels)):
            rank_zero_warn(
                f"expected samples of all {self.num_classes} classes in the {split} split, got none of {empty}; its accuracy "
                "is that of the other classes"
            )
        return source

    def load_train(self) -> Source:
        """Return the training images."""
        return self.source("train")

    def load_val(self) -> Source:
        """Return the validation images."""
        return self.source("val")

    def load_test(self) -> Source:
        """Return the test images."""
        return self.source("test")
