"""Views of a batch on the device, against torchvision's pipeline on single PIL images in worker processes."""

import random
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.measure import DEVICE, medians
from sanm_lightning.data.policies import augment

COUNT, BATCH = 5120, 128


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


POOL = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.05 + 0.09 * level),
    "saturation": lambda image, level, sign: ImageEnhance.Color(image).enhance(0.05 + 0.09 * level),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(0.05 + 0.09 * level),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "identity": lambda image, level, sign: image,
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 + int(level * 4 / 10)),
    "rotate": lambda image, level, sign: image.rotate(sign * 3 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.05 + 0.09 * level),
    "shear_x": lambda image, level, sign: _affine(image, 1, sign * 0.03 * level, 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.03 * level, 1, 0),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
    "translate_x": lambda image, level, sign: _affine(
        image, 1, 0, -sign * int(level * 0.3 / 10 * image.width), 0, 1, 0
    ),
    "translate_y": lambda image, level, sign: _affine(
        image, 1, 0, 0, 0, 1, -sign * int(level * 0.3 / 10 * image.height)
    ),
}
"""Operations of RandAugment on one image: level 1 to 9, sign 1 or -1."""


def gray_square(image: Image.Image, x: float, y: float, side: int = 16) -> Image.Image:
    """Cutout of RandAugment on one image, around a point in pixels."""
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    right, bottom = int(min(image.width, left + side)), int(min(image.height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle((left, top, right, bottom), (127, 127, 127))  # the last row and column included
    return image


def rand_augment(image: Image.Image) -> Image.Image:
    """RandAugment as in FixMatch's PyTorch port: two operations and a gray square, on one image."""
    for operation in random.choices(list(POOL.values()), k=2):
        if random.random() < 0.5:
            image = operation(image, random.randint(1, 9), random.choice((1, -1)))
    return gray_square(image, random.uniform(0, image.width), random.uniform(0, image.height))


WEAK = [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip()]
PIPELINES = {
    "weak": WEAK,
    "rand_augment": [*WEAK, rand_augment],
    "auto_augment": [*WEAK, T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)],
    "simclr": [
        T.RandomResizedCrop(32, (0.2, 1.0)),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
    ],
}


class OneByOne(Dataset[Tensor]):
    """What a CIFAR data set of torchvision does for each sample."""

    def __init__(self, images: Any, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        view: Tensor = self.transform(Image.fromarray(self.images[index]))
        return view


def run(repeats: int) -> dict[str, dict[str, float]]:
    """Return images per second of both, and their ratio, for each policy."""
    bytes_ = torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resident = bytes_.to(DEVICE)
    workers = torch.get_num_threads()
    rows = {}
    for policy, pipeline in PIPELINES.items():
        dataset = OneByOne(bytes_.permute(0, 2, 3, 1).numpy(), T.Compose([*pipeline, T.ToTensor()]))
        # the workers take a single thread each, as ours take all together
        loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
        generator = torch.Generator().manual_seed(0)

        def ours(policy: str = policy, generator: torch.Generator = generator) -> None:
            for index in torch.randperm(COUNT, generator=generator).split(BATCH):
                images = resident.index_select(0, index.to(DEVICE))
                augment(images, policy, generator).float().div_(255)

        def theirs(loader: Any = loader) -> None:
            for batch in loader:
                batch.to(DEVICE)

        taken = medians({"device": ours, "pil": theirs}, repeats)
        rows[policy] = {
            "device_images_per_s": COUNT / taken["device"],
            "pil_images_per_s": COUNT / taken["pil"],
            "ratio": taken["pil"] / taken["device"],
        }
        del loader
    return rows
