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


def _shift(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


POOL = [
    lambda image, m: ImageOps.autocontrast(image),
    lambda image, m: ImageEnhance.Brightness(image).enhance(0.05 + 0.9 * m),
    lambda image, m: ImageEnhance.Color(image).enhance(0.05 + 0.9 * m),
    lambda image, m: ImageEnhance.Contrast(image).enhance(0.05 + 0.9 * m),
    lambda image, m: ImageOps.equalize(image),
    lambda image, m: image,
    lambda image, m: ImageOps.posterize(image, 4 + int(4 * m)),
    lambda image, m: image.rotate(30 * m),
    lambda image, m: ImageEnhance.Sharpness(image).enhance(0.05 + 0.9 * m),
    lambda image, m: _shift(image, (1, 0.3 * m, 0, 0, 1, 0)),
    lambda image, m: _shift(image, (1, 0, 0, 0.3 * m, 1, 0)),
    lambda image, m: ImageOps.solarize(image, int(256 * m)),
    lambda image, m: _shift(image, (1, 0, 0.3 * m * image.size[0], 0, 1, 0)),
    lambda image, m: _shift(image, (1, 0, 0, 0, 1, 0.3 * m * image.size[1])),
]


def rand_augment(image: Image.Image) -> Image.Image:
    """RandAugment as FixMatch has it, two operations and a grey square, on one image."""
    for operation in random.choices(POOL, k=2):
        if random.random() < 0.5:
            image = operation(image, random.randint(1, 9) / 10)
    x, y = random.randrange(image.size[0]), random.randrange(image.size[1])
    image = image.copy()
    half = image.size[0] // 4
    ImageDraw.Draw(image).rectangle((x - half, y - half, x + half - 1, y + half - 1), (127, 127, 127))
    return image


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
