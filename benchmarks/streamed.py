"""Rows of a set that streams, decoded from files by workers, against torchvision's ImageFolder with as many decodings."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
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


def epochs(folder: Path, views: tuple[View, ...]) -> Any:
    """Return a function that runs one epoch through the data module: rows, then views on the device."""
    data = ImageFolder(
        str(folder), image_size=CROP, decode_size=SIDE, batch_size=BATCH, crop_padding=0, resident_bytes=0,
        num_workers=WORKERS, seed=0,
    )  # fmt: skip
    data.trainer = Alone(Asking(views))  # type: ignore[assignment]
    loader = data.train_dataloader()

    def run() -> int:
        loader.set_epoch(loader.position[0] + 1)
        samples = 0
        for item in loader:
            moved = type(item)(*(_moved(part) for part in item))
            samples += len(data._training_batch(moved).images)
        return samples

    return run


def _moved(part: Any) -> Any:
    return [_moved(one) for one in part] if isinstance(part, list) else part.to(DEVICE, non_blocking=True)


def plain(folder: Path, strong: bool) -> Any:
    """Return a function that runs one epoch of torchvision's data set: one view per decoding."""
    steps = [T.Resize(SIDE), T.RandomCrop(CROP), T.RandomHorizontalFlip(), *([T.RandAugment()] if strong else [])]
    dataset = Plain(str(folder / "train"), T.Compose([*steps, T.ToTensor()]))
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, pin_memory=DEVICE.type == "cuda")

    def run() -> int:
        return sum(len(images.to(DEVICE, non_blocking=True)) for images, _ in loader)

    return run


ROWS: dict[str, tuple[View, ...]] = {
    "dividemix": ("weak", "weak"),  # 4 blocks of 32: labelled and unlabelled of two networks
    "ssr": (("none", "weak"), ("rand_augment", "weak")),  # 2 blocks of 64
}


def run(repeats: int, count: int = 512) -> dict[str, Any]:
    """Return decoded images per second of both, and their ratio: above 1, the data module is the faster one."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_files(folder, count)
        runs = {name: epochs(folder, views) for name, views in ROWS.items()} | {"plain": plain(folder, False)}
        taken = medians(runs, repeats)
        rows = {f"{name}_images_per_s": count / seconds for name, seconds in taken.items()}
        rows |= {f"{name}_ratio": taken["plain"] / taken[name] for name in ROWS}
    return rows
