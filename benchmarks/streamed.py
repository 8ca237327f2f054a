"""Rows of a set that streams, decoded from files by workers, against torchvision's ImageFolder with as many decodings."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder as Plain

from benchmarks.measure import DEVICE, medians
from sanm_lightning.batch import EpochPlan, View
from sanm_lightning.data import ImageFolder

SIDE, CROP = 256, 224
WORKERS, BATCH, CLASSES = 2, 128, 2


def draw_files(folder: Path, count: int) -> None:
    """Write smooth random JPEGs of 256 pixels, the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        for part in ("train", "test") if number < CLASSES else ("train",):
            target = folder / part / f"class{number % CLASSES}"
            target.mkdir(parents=True, exist_ok=True)
            coarse = torch.rand(1, 3, 24, 24, generator=generator) * 255
            fine = torch.rand(1, 3, SIDE, SIDE, generator=generator) * 24
            pixels = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic") + fine
            array = pixels[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(array).save(target / f"{number:05d}.jpg", quality=90)


class Asking:
    """What a method tells the data module: the views of a row, and the rows of an epoch."""

    def __init__(self, views: tuple[View, ...]) -> None:
        self.wanted = views

    def prepare_epoch(self) -> None:
        """Do nothing."""

    def views(self) -> tuple[View, ...]:
        """Return the views that were asked for."""
        return self.wanted

    def epoch_batches(self, plan: EpochPlan) -> Tensor:
        """Return every sample once, in random order."""
        order = torch.randperm(plan.num_samples, generator=torch.Generator().manual_seed(plan.epoch))
        return order[: plan.steps * plan.batch_size].view(plan.steps, plan.batch_size)


class Alone:
    """As much of a trainer as the data module reads."""

    global_rank, world_size, overfit_batches, current_epoch, training = 0, 1, 0, 0, True

    def __init__(self, module: Asking) -> None:
        self.lightning_module = module
        self.strategy = SimpleNamespace(root_device=DEVICE)


def epochs(folder: Path, views: tuple[View, ...]) -> Callable[[], object]:
    """Return a function that runs one epoch through the data module: rows, then views on the device."""
    data = ImageFolder(
        str(folder), image_size=CROP, decode_size=SIDE, batch_size=BATCH, crop_padding=0, resident_bytes=0,
        num_workers=WORKERS, seed=0,
    )  # fmt: skip
    data.trainer = Alone(Asking(views))  # type: ignore[assignment]
    loader = data.train_dataloader()

    def run() -> None:
        loader.set_epoch(loader.position[0] + 1)
        for item in loader:
            data._training_batch(move_data_to_device(item, DEVICE))

    return run


class Views(Dataset[tuple[Tensor, ...]]):
    """Decode a file once, as torchvision's data set does, and make views of it one by one.

    A view is ``weak``, ``strong``, or ``half``: strong for every other file.
    """

    def __init__(self, folder: Path, *views: str) -> None:
        self.files, self.views = Plain(str(folder / "train")), views
        self.resize = T.Resize(SIDE)
        weak = [T.RandomCrop(CROP), T.RandomHorizontalFlip()]
        self.weak = T.Compose([*weak, T.ToTensor()])
        self.strong = T.Compose([*weak, T.RandAugment(), T.ToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image = self.resize(self.files[index][0])
        strong = {"weak": False, "strong": True, "half": index % 4 > 1}
        return tuple((self.strong if strong[view] else self.weak)(image) for view in self.views)


def plain(folder: Path, *views: str) -> Callable[[], object]:
    """Return a function that runs one epoch of torchvision's path with these views of each file."""
    loader = DataLoader(
        Views(folder, *views), BATCH, shuffle=True, num_workers=WORKERS, pin_memory=DEVICE.type == "cuda"
    )

    def run() -> None:
        for batch in loader:
            move_data_to_device(batch, DEVICE)

    return run


ROWS: dict[str, tuple[tuple[View, ...], tuple[str, ...]]] = {
    "dividemix": (("weak", "weak"), ("weak", "weak")),  # 4 blocks of 32: labelled and unlabelled of two networks
    "ssr": ((("rand_augment", "weak"), "rand_augment"), ("half", "strong")),  # half of the samples drawn, half in turn
}
"""By method: the views of its rows, and as many views of the same strength for torchvision."""


def run(repeats: int, count: int = 1024) -> dict[str, Any]:
    """Return decoded images per second, and ratios: above 1, the data module is the faster one.

    ``ratio`` is against torchvision with as many decodings and views, ``ratio_one_view`` against a single weak view of each
    image.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_files(folder, count)
        runs = {"one_view": plain(folder, "weak")}
        for method, (views, theirs) in ROWS.items():
            runs[method], runs[f"{method}_plain"] = epochs(folder, views), plain(folder, *theirs)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waiting threads would compete with the workers
        taken = medians(runs, repeats)
        torch.set_num_threads(threads)
    return {
        "torchvision_one_view_images_per_s": count / taken["one_view"],
        **{
            method: {
                "images_per_s": count / taken[method],
                "torchvision_images_per_s": count / taken[f"{method}_plain"],
                "ratio": taken[f"{method}_plain"] / taken[method],
                "ratio_one_view": taken["one_view"] / taken[method],
            }
            for method in ROWS
        },
    }
