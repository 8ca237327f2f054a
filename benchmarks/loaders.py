"""Images per second of loaders that make one random crop and flip of each JPEG, with two workers.

AlbumentationsX and kornia are measured where they are installed: ``pip install -e '.[bench]'``.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder as Plain

from benchmarks.measure import DEVICE, medians
from benchmarks.streamed import BATCH, CROP, SIDE, WORKERS, draw_files, epochs, plain

__all__ = ["AlbumentationsFiles", "KorniaFiles", "run"]


class AlbumentationsFiles(Dataset[tuple[Tensor, int]]):
    """Files decoded by OpenCV and transformed by AlbumentationsX one by one, as in its documentation."""

    def __init__(self, folder: Path) -> None:
        import albumentations as A

        self.samples = Plain(str(folder / "train")).samples
        self.transform = A.Compose([A.SmallestMaxSize(SIDE), A.RandomCrop(CROP, CROP), A.HorizontalFlip(p=0.5)])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import cv2

        path, label = self.samples[index]
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        view = self.transform(image=image)["image"]
        return torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))).float().div_(255), label


class KorniaFiles(Dataset[tuple[Tensor, int]]):
    """Files of one size, decoded by kornia's reader; batches are transformed afterwards."""

    def __init__(self, folder: Path) -> None:
        self.samples = Plain(str(folder / "train")).samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from kornia_rs.io import read_image_jpegturbo

        path, label = self.samples[index]
        return torch.from_numpy(np.asarray(read_image_jpegturbo(path))).permute(2, 0, 1), label


def _loader(files: Dataset[Any], collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    return DataLoader(
        files, BATCH, shuffle=True, num_workers=WORKERS, collate_fn=collate, pin_memory=DEVICE.type == "cuda"
    )


def albumentationsx(folder: Path) -> Callable[[], object]:
    """Return a function that runs one epoch with AlbumentationsX."""
    loader = _loader(AlbumentationsFiles(folder))

    def run() -> None:
        for images, _ in loader:
            images.to(DEVICE, non_blocking=True)

    return run


def kornia(folder: Path) -> Callable[[], object]:
    """Return a function that runs one epoch with kornia: the transforms are those of a batch, on the device."""
    import kornia.augmentation as K

    loader = _loader(KorniaFiles(folder))
    transform = torch.nn.Sequential(K.RandomCrop((CROP, CROP), cropping_mode="slice"), K.RandomHorizontalFlip(p=0.5))

    def run() -> None:
        for images, _ in loader:
            transform(images.to(DEVICE, non_blocking=True).float().div(255))

    return run


OTHERS = {"albumentationsx": ("albumentations", albumentationsx), "kornia": ("kornia", kornia)}


def run(repeats: int, count: int = 1024) -> dict[str, Any]:
    """Return images per second of each loader, and ratios: above 1, the data module is the faster one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_files(folder, count)
        runs = {"sanm_lightning": epochs(folder, ("weak",)), "torchvision": plain(folder, "weak")}
        for other, (package, make) in OTHERS.items():
            if importlib.util.find_spec(package) is not None:
                runs[other] = make(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waiting threads would compete with the workers
        before = os.getloadavg()[0]
        taken = medians(runs, repeats)
        torch.set_num_threads(threads)
    own = taken["sanm_lightning"]
    return {
        "load_average_before": before,
        **{
            name: {"images_per_s": count / seconds} | ({} if name == "sanm_lightning" else {"ratio": seconds / own})
            for name, seconds in taken.items()
        },
    }
