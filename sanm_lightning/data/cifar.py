"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read with torchvision."""

from typing import Any, ClassVar

import torch
import torchvision

from sanm_lightning.data.datamodule import NoisyDataModule, Source
from sanm_lightning.data.noise import CIFAR100_SUPERCLASSES

__all__ = ["CIFAR10", "CIFAR100", "CIFARFiles"]


class CIFARFiles(NoisyDataModule):
    """Base class of CIFAR-10 and CIFAR-100."""

    files: ClassVar[type[torchvision.datasets.CIFAR10]]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, root: str = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self.download = download

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(32, 32) pixels."""
        return 32, 32

    @property
    def class_names(self) -> list[str]:
        """Class names, in the order of the class indices."""
        return list(self.names)

    def prepare_data(self) -> None:
        """Download the files to ``root`` if they are missing.

        Raises:
            FileNotFoundError: if the files are missing and cannot be downloaded.
        """
        try:
            self._open(train=True)
        except FileNotFoundError:
            if not self.download:
                raise
            try:
                self.files(self.root, train=True, download=True)
            except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken archive is a RuntimeError
                raise FileNotFoundError(
                    f"expected a download to {self.root!r}, got no files of {type(self).__name__} and a failed "
                    f"download ({error}); copy the folder {self.files.base_folder!r} of its Python version to "
                    f"{self.root!r}, or set its location with --data.root"
                ) from error

    def load_train(self) -> Source:
        """Return the training set."""
        return self._read(train=True)

    def load_test(self) -> Source:
        """Return the test set."""
        return self._read(train=False)

    def _read(self, train: bool) -> Source:
        data = self._open(train)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Source(torch.tensor(data.targets, dtype=torch.int64), images)

    def _open(self, train: bool) -> torchvision.datasets.CIFAR10:
        try:
            return self.files(self.root, train=train, download=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"expected the files of {type(self).__name__} in {self.root!r}, got missing or damaged files; copy the "
                f"folder {self.files.base_folder!r} of its Python version there, set its location with --data.root, or "
                "enable the download"
            ) from error


class CIFAR10(CIFARFiles):
    """CIFAR-10: 32 x 32 color images of 10 balanced classes.

    Args:
        root: folder that contains ``cifar-10-batches-py``, or the destination of the download.
        download: whether to download missing files.
        mean: channel means of the training images.
        std: channel standard deviations of the training images.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        FileNotFoundError: on access, if files are missing and the download is disabled or fails.
    """

    files = torchvision.datasets.CIFAR10
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: tuple[float, float, float] | None = (0.4914, 0.4822, 0.4465),
        std: tuple[float, float, float] | None = (0.2023, 0.1994, 0.2010),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, mean=mean, std=std, **kwargs)


class CIFAR100(CIFARFiles):
    """CIFAR-100: 32 x 32 color images of 100 balanced classes (the fine labels).

    Args:
        root: folder that contains ``cifar-100-python``, or the destination of the download.
        download: whether to download missing files.
        mean: channel means of the training images.
        std: channel standard deviations of the training images.
        **kwargs: as for `NoisyDataModule`.

    Raises:
        FileNotFoundError: on access, if files are missing and the download is disabled or fails.
    """

    files = torchvision.datasets.CIFAR100
    names = tuple(sorted(name for members in CIFAR100_SUPERCLASSES.values() for name in members))

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        mean: tuple[float, float, float] | None = (0.507, 0.487, 0.441),
        std: tuple[float, float, float] | None = (0.267, 0.256, 0.276),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, download=download, mean=mean, std=std, **kwargs)
