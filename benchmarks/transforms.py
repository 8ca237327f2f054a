"""Views and masks of a batch on the device, against ``torchvision.transforms.v2`` on the same device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.measure import DEVICE, medians
from sanm_lightning.data.policies import augment
from sanm_lightning.sanm import apply_mask, mask_box

WEAK = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
POLICIES: dict[str, Any] = {
    "weak": v2.Compose(WEAK),
    "auto_augment": v2.Compose([*WEAK, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]),
    "rand_augment": v2.Compose([*WEAK, v2.RandAugment(2, 9), v2.RandomErasing(1.0, (0.25, 0.25), (1, 1), 127)]),
    "simclr": v2.Compose(
        [
            v2.RandomResizedCrop(32, (0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
        ]
    ),
}
"""Counterparts of the policies of this package. RandAugment differs in its operations, not in their number."""
MASK = v2.RandomErasing(1.0, (0.3, 0.3), (0.8, 1.25), "random")
"""A box of three tenths of the image, as SANM's mask for a label of quality 0, at a random place."""


def run(repeats: int, batch_size: int = 128) -> dict[str, dict[str, float]]:
    """Return images per second of this package, of torchvision image by image, and of torchvision with one draw per batch.

    The last one is no substitute: all images of a batch have the same crop, operations and box.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, generator=generator).to(DEVICE)
    rows = {}
    for policy, transform in POLICIES.items():
        rows[policy] = _rates(images, partial(augment, images, policy, generator), transform, repeats)
    floating = images.float() / 255
    maps = torch.rand(batch_size, 32, 32, generator=generator).to(DEVICE)
    ratio, aspect = torch.full((batch_size,), 0.3, device=DEVICE), torch.ones(batch_size, device=DEVICE)
    rows["mask"] = _rates(floating, lambda: apply_mask(floating, mask_box(maps, ratio, aspect)), MASK, repeats)
    return rows


def _rates(images: Tensor, ours: Callable[[], Tensor], transform: Any, repeats: int) -> dict[str, float]:
    taken = medians(
        {
            "package": ours,
            "torchvision_each": lambda: torch.stack([transform(image) for image in images]),
            "torchvision_batch": lambda: transform(images),
        },
        repeats,
    )
    rates = {f"{name}_images_per_s": len(images) / seconds for name, seconds in taken.items()}
    return {**rates, "package_over_torchvision_each": taken["torchvision_each"] / taken["package"]}
