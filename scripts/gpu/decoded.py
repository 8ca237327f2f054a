"""CIFAR-10 from a folder of image files, decoded once for several runs."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import make_dataset

from sanm_lightning.data import CIFAR10
from sanm_lightning.data.datamodule import Source
from sanm_lightning.data.decode import read_image
from sanm_lightning.safe_files import atomic_write

__all__ = ["DecodedCIFAR10", "decode"]


def decode(root: Path, out: Path) -> dict[str, int]:
    """Decode ``root/train/<class>/`` and ``root/test/<class>/`` to ``out/train.pt`` and ``out/test.pt``.

    Args:
        root: folder of the image files, with the class names of CIFAR-10.
        out: folder of the tensors.

    Returns:
        Number of images of each split.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in ("train", "test"):
        place = {name: number for number, name in enumerate(CIFAR10.names)}
        listed = make_dataset(str(root / split), place, (".jpg", ".jpeg", ".png"), allow_empty=True)
        if not listed:
            raise FileNotFoundError(
                f"expected images in train/<class>/ and test/<class>/, got none in {split}; correct --root"
            )
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda row: read_image(row[0], 32), listed))
        with atomic_write(out / f"{split}.pt") as file:
            torch.save({"images": torch.stack(images), "labels": torch.tensor([row[1] for row in listed])}, file)
        counts[split] = len(listed)
    return counts


class DecodedCIFAR10(CIFAR10):
    """CIFAR-10 from the files of :func:`decode`.

    Args:
        root: folder that contains ``train.pt`` and ``test.pt``.
        **kwargs: as for :class:`~sanm_lightning.data.NoisyDataModule`.
    """

    def __init__(self, root: str = "data", **kwargs: Any) -> None:
        super().__init__(root=root, download=False, **kwargs)

    def prepare_data(self) -> None:
        """Do nothing: the files exist."""

    def _read(self, train: bool) -> Source:
        held = torch.load(Path(self.root) / f"{'train' if train else 'test'}.pt", weights_only=True)
        return Source(held["labels"], held["images"])
