"""Augmentation policies by name: parameters are sampled per image on the CPU and applied to the batch on its device."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.data.auto_augment import CIFAR10_POLICY, GRAY, SSR_POLICY, Form, draw_auto_augment
from sanm_lightning.data.operations import affine_matrix, resample, resized_crop
from sanm_lightning.data.rand_augment import POOL, cut_square, draw_cutout, draw_rand_augment
from sanm_lightning.data.stages import NAMES, NUMBER, Stage, apply_stage, coin
from sanm_lightning.data.views import crop_flip, draw_crop_flip

__all__ = [
    "CIFAR10_POLICY",
    "NAMES",
    "POLICIES",
    "POOL",
    "SSR_POLICY",
    "Stage",
    "apply_stage",
    "augment",
    "center_crop",
    "draw_auto_augment",
    "draw_color_jitter",
    "draw_rand_augment",
    "draw_resized_crop",
]


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


# Color jitter, resized crops ------------------------------------------------------------------------------------------


def draw_color_jitter(
    batch: int, strength: float, hue: float, generator: torch.Generator, probability: float = 1.0
) -> list[Stage]:
    """Sample brightness, contrast and saturation factors from U(1 - strength, 1 + strength) and a hue shift.

    The order of the four operations is random for each image.

    Args:
        batch: B, number of images.
        strength: in [0, 1].
        hue: largest hue shift, in turns, in [0, .5].
        generator: random generator, on the CPU.
        probability: probability that an image is jittered.

    Returns:
        The stages, to be applied in order.
    """
    numbers = torch.tensor([NUMBER[name] for name in ("brightness", "contrast", "saturation", "hue")])
    order = torch.rand((batch, 4), generator=generator).argsort(1)
    amount = _uniform((batch, 4), 1 - strength, 1 + strength, generator)
    amount[:, 3] = _uniform((batch,), -hue, hue, generator)
    used = torch.rand((batch,), generator=generator) < probability
    return [
        Stage(torch.where(used, numbers[place], NUMBER["identity"]), amount.gather(1, place[:, None])[:, 0])
        for place in order.unbind(1)
    ]


def draw_resized_crop(
    batch: int, height: int, width: int, smallest: float, generator: torch.Generator, tries: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample windows with area fraction U(smallest, 1) and log-uniform aspect in [3/4, 4/3], as torchvision does.

    Windows that do not fit are resampled; after ``tries``, the largest centered window is used.

    Args:
        batch: B, number of images.
        height: height of the images in pixels.
        width: width of the images in pixels.
        smallest: smallest fraction of the area, in (0, 1].
        generator: random generator, on the CPU.
        tries: number of samples per image.

    Returns:
        top, left, height, width of each window, shape (B,), int64.
    """
    shape = (tries, batch)
    area = height * width * _uniform(shape, smallest, 1.0, generator)
    aspect = _uniform(shape, math.log(3 / 4), math.log(4 / 3), generator).exp()  # width over height
    rows, columns = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (rows >= 1) & (rows <= height) & (columns >= 1) & (columns <= width)
    first = fits.int().argmax(0, keepdim=True)
    largest = (min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3)))
    found = fits.any(0)
    rows = torch.where(found, rows.gather(0, first)[0], largest[0])
    columns = torch.where(found, columns.gather(0, first)[0], largest[1])
    corner = torch.where(found, torch.rand((2, batch), generator=generator), 0.5)
    # 1/2 is the center: the largest window has no margin in one direction, and its margin is halved in the other
    top, left = ((corner[0] * (height - rows + found)).floor(), (corner[1] * (width - columns + found)).floor())
    return top.long(), left.long(), rows.long(), columns.long()


# The policies --------------------------------------------------------------------------------------------------------


def _weak(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    if not padding and not flip:
        return images
    return crop_flip(images, draw_crop_flip(len(images), padding, flip, generator), padding)


def _auto_augment(
    images: Tensor, generator: torch.Generator, padding: int, flip: bool, form: Form = "published"
) -> Tensor:
    images = _weak(images, generator, padding, flip)
    for stage in draw_auto_augment(len(images), images.shape[2], images.shape[3], generator, form):
        images = apply_stage(images, stage, fill=0 if form == "published" else GRAY)
    return images


def _rand_augment(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    images = _weak(images, generator, padding, flip)
    batch, height, width = len(images), images.shape[2], images.shape[3]
    for stage in draw_rand_augment(batch, height, width, generator):
        images = apply_stage(images, stage)
    return cut_square(images, *draw_cutout(batch, height, width, generator))


def _jitter_affine(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    batch, height, width = len(images), images.shape[2], images.shape[3]
    for stage in draw_color_jitter(batch, 0.4, 0.4, generator):
        images = apply_stage(images, stage)
    crop = draw_crop_flip(batch, padding, flip, generator)
    matrix = affine_matrix(
        angle=_uniform((batch,), -15, 15, generator),
        translate_x=_uniform((batch,), -0.1 * width, 0.1 * width, generator).round(),
        translate_y=_uniform((batch,), -0.1 * height, 0.1 * height, generator).round(),
        scale=_uniform((batch,), 2 / 3, 3 / 2, generator),
        shear_x=_uniform((batch,), -0.1, 0.1, generator),
    )
    return resample(images, matrix, crop, padding)


def _simclr(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Apply a resized crop of .2 to 1 of the area, flip, color jitter (p = .8) and grayscale (p = .2); no blur."""
    batch, device = len(images), images.device
    window = draw_resized_crop(batch, images.shape[2], images.shape[3], 0.2, generator)
    images = resized_crop(images, *(part.to(device, non_blocking=True) for part in window))
    flipped = coin((batch,), generator).to(device, non_blocking=True)
    images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    gray = torch.rand((batch,), generator=generator) < 0.2
    last = Stage(torch.where(gray, NUMBER["grey"], NUMBER["identity"]), torch.zeros(batch))
    for stage in [*draw_color_jitter(batch, 0.4, 0.1, generator, 0.8), last]:
        images = apply_stage(images, stage)
    return images


POLICIES: dict[str, Callable[[Tensor, torch.Generator, int, bool], Tensor]] = {
    "none": lambda images, generator, padding, flip: images,
    "weak": _weak,
    "auto_augment": _auto_augment,
    "auto_augment_released": partial(_auto_augment, form="released"),
    "auto_augment_ssr": partial(_auto_augment, form="ssr"),
    "rand_augment": _rand_augment,
    "jitter_affine": _jitter_affine,
    "simclr": _simclr,
}
"""Name -> function (images, generator, padding, flip). Sources: AutoAugment (Cubuk et al., CVPR 2019, CIFAR-10 policy) as
published, in the form of SANM's code and in that of SSR's code, and RandAugment with cutout as in FixMatch's PyTorch port,
which SANM's code uses, each after crop and flip; SimCLR (Chen et al., ICML 2020); the warm-up views of C2D's code: color
jitter before crop and flip, an affine transform after them."""


def augment(
    images: Tensor,
    policy: str,
    generator: torch.Generator,
    padding: int = 4,
    flip: bool = True,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Augment each image.

    Args:
        images: shape (B, C, H, W), uint8. Not modified. C is 3 (RGB) or 1 (gray); any number for ``none`` and
            ``weak``.
        policy: a name in :data:`POLICIES`.
        generator: random generator, on the CPU; torch's global stream is not used.
        padding: pixels of zero padding for the crop, in policies that crop.
        flip: whether policies that crop also flip horizontally.
        size: h, w of the views, at most those of the images. Larger images are cropped at random positions before the
            policy (``none``: at the center); ``simclr`` crops from the whole image and resizes the view.

    Returns:
        Views, shape (B, C, h, w), uint8, on the device of the images.

    Raises:
        ValueError: if the policy is unknown, the size is larger than the images, or the policy changes colors and C is
            neither 3 nor 1.
    """
    if policy not in POLICIES:
        raise ValueError(f"expected a view among {', '.join(POLICIES)}, got {policy!r}; choose one of them")
    if images.shape[1] not in (1, 3) and policy not in ("none", "weak"):
        raise ValueError(
            f"expected RGB or gray images for the view {policy!r}, got {images.shape[1]} channels; use 'weak', or a custom "
            "policy"
        )
    size = (images.shape[2], images.shape[3]) if size is None else size
    if not len(images):
        return center_crop(images, size)
    if size == tuple(images.shape[2:]):
        return POLICIES[policy](images, generator, padding, flip)
    if policy == "none":
        return center_crop(images, size)
    if policy == "simclr":
        viewed = POLICIES[policy](images, generator, padding, flip)
        resized = F.interpolate(viewed.float(), size, mode="bilinear", align_corners=False, antialias=True)
        return resized.round_().clamp_(0, 255).to(torch.uint8)
    if policy != "jitter_affine":  # these policies start with the crop, which is taken from the larger image
        cropped = crop_flip(
            images, draw_crop_flip(len(images), padding, flip, generator, _rest(images, size)), padding, size
        )
        return POLICIES[policy](cropped, generator, 0, False)
    cropped = crop_flip(images, draw_crop_flip(len(images), 0, False, generator, _rest(images, size)), 0, size)
    return POLICIES[policy](cropped, generator, padding, flip)


def _rest(images: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    rest = images.shape[2] - size[0], images.shape[3] - size[1]
    if min(rest) < 0:
        raise ValueError(
            f"expected views no larger than the images {tuple(images.shape[2:])}, got {size}; increase decode_size"
        )
    return rest


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images (B, C, H, W) to ``size`` (h, w) at the center."""
    top, left = (rest // 2 for rest in _rest(images, size))
    return images[:, :, top : top + size[0], left : left + size[1]]
