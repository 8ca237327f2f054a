"""Augmentation policies by name, on bytes, one image after the other with torchvision's own operations.

Each policy is a function (3, H, W) uint8 -> (3, H, W) uint8 that draws from torch's global stream; :func:`augment` runs it on
a batch with a stream of its own. ``weak`` (crop and flip) is done for the whole batch at once, see ``views``.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sanm_lightning.data.views import crop_flip, draw_crop_flip

__all__ = ["POLICIES", "augment"]

_to_cifar = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, interpolation=v2.InterpolationMode.NEAREST)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _affine(image: Tensor, translate: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
    out: Tensor = F.affine(image, 0.0, [round(t) for t in translate], 1.0, [float(s) for s in shear])
    return out


def _sign() -> float:
    return 1.0 if bool(torch.rand(()) < 0.5) else -1.0


def _degrees(slope: float) -> float:
    return float(torch.rad2deg(torch.atan(torch.tensor(slope))))


# FixMatch's fourteen operations (Sohn et al., NeurIPS 2020, Table 12); each takes an image and a strength in (0, 1).
_POOL: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda x, m: F.autocontrast(x),
    lambda x, m: F.adjust_brightness(x, 0.05 + 0.9 * m),
    lambda x, m: F.adjust_saturation(x, 0.05 + 0.9 * m),
    lambda x, m: F.adjust_contrast(x, 0.05 + 0.9 * m),
    lambda x, m: F.equalize(x),
    lambda x, m: x,
    lambda x, m: F.posterize(x, 4 + int(4 * m)),
    lambda x, m: F.rotate(x, _sign() * 30 * m),
    lambda x, m: F.adjust_sharpness(x, 0.05 + 0.9 * m),
    lambda x, m: _affine(x, shear=(_degrees(_sign() * 0.3 * m), 0)),
    lambda x, m: _affine(x, shear=(0, _degrees(_sign() * 0.3 * m))),
    lambda x, m: F.solarize(x, int(256 * m)),
    lambda x, m: _affine(x, translate=(_sign() * 0.3 * m * x.shape[2], 0)),
    lambda x, m: _affine(x, translate=(0, _sign() * 0.3 * m * x.shape[1])),
)


def _rand_augment(image: Tensor, operations: int = 2, levels: int = 10) -> Tensor:
    """RandAugment as FixMatch's PyTorch ports have it.

    Two operations of 14, each with probability 1/2 at a level of 1 to 9, then always a grey square of half the image's side,
    clipped at the border.
    """
    for _ in range(operations):
        operation = _POOL[int(torch.randint(len(_POOL), ()))]
        strength = int(torch.randint(1, levels, ())) / levels
        if torch.rand(()) < 0.5:
            image = operation(image, strength)
    height, width = image.shape[1:]
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, left = max(0, row - height // 4), max(0, column - width // 4)
    image = image.clone()
    image[:, top : row + height // 4, left : column + width // 4] = 127
    return image


def _simclr(image: Tensor) -> Tensor:
    """SimCLR's views for small images: resized crop of a fifth to all of the area, flip, colour jitter, grey; no blur."""
    size = list(image.shape[1:])
    image = v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True)(image)
    image = v2.RandomHorizontalFlip()(image)
    if torch.rand(()) < 0.8:
        image = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)(image)
    out: Tensor = v2.RandomGrayscale(0.2)(image)
    return out


_jitter_affine = v2.Compose(
    [v2.ColorJitter(0.4, 0.4, 0.4, 0.4), v2.RandomAffine(15, (0.1, 0.1), (2 / 3, 3 / 2), shear=(-0.1, 0.1))]
)

POLICIES: dict[str, tuple[bool, Callable[[Tensor], Tensor] | None]] = {
    "none": (False, None),
    "weak": (True, None),
    "auto_augment": (True, lambda image: _to_cifar(image)),
    "rand_augment": (True, _rand_augment),
    "jitter_affine": (True, lambda image: _jitter_affine(image)),
    "simclr": (False, _simclr),
}
"""Name -> (crop and flip first, what is done to each image after that). Sources: AutoAugment (Cubuk et al., CVPR 2019, the
CIFAR-10 policy), RandAugment as in FixMatch, SimCLR (Chen et al., ICML 2020), and the warm-up views of C2D's code."""


def augment(images: Tensor, policy: str, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Make one view of each image.

    Args:
        images: shape (B, 3, H, W), uint8.
        policy: a name in :data:`POLICIES`.
        generator: source of all randomness, on the CPU; torch's global stream is left as it was.
        padding: pixels of zero padding for the crop, where the policy crops.
        flip: whether a policy that crops may mirror as well.

    Returns:
        Views, shape (B, 3, H, W), uint8, on the device of the images.

    Raises:
        ValueError: the policy is not known.
    """
    if policy not in POLICIES:
        raise ValueError(f"The view must be one of {', '.join(POLICIES)}, got {policy!r}: choose one of them.")
    crops, operation = POLICIES[policy]
    if crops and (padding or flip):
        images = crop_flip(images, draw_crop_flip(len(images), padding, flip, generator), padding)
    if operation is None or not len(images):
        return images
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng([]):  # the parameters are drawn on the CPU
        torch.manual_seed(seed)
        return torch.stack([operation(image) for image in images])
