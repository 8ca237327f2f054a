"""Augmentation policies by name: parameters are sampled per image on the CPU and applied to the batch on its device.

Sampling on the CPU avoids a synchronization with the device to find the images of each operation.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.data.operations import (
    MOVES,
    NEIGHBORS,
    OPERATIONS,
    TABLES,
    affine_matrix,
    cutout,
    look_up,
    resample,
    resized_crop,
)
from sanm_lightning.data.views import crop_flip, draw_crop_flip, select_rows

__all__ = [
    "POLICIES",
    "Stage",
    "apply_stage",
    "augment",
    "center_crop",
    "draw_auto_augment",
    "draw_color_jitter",
    "draw_rand_augment",
    "draw_resized_crop",
    "takes_batches",
]

NAMES = list(OPERATIONS)
NUMBER = {name: number for number, name in enumerate(NAMES)}


class Stage(NamedTuple):
    """One operation for each image of a batch."""

    operation: Tensor
    """Positions in :data:`NAMES`, shape (B,), int64, on the CPU."""
    amount: Tensor
    """Amount of the operation, see :data:`OPERATIONS`, shape (B,), float32, on the CPU."""


def apply_stage(images: Tensor, stage: Stage) -> Tensor:
    """Apply one operation to each image: bytes (B, 3, H, W) on any device -> new bytes.

    The images are sorted by operation, so that each operation, and each kind of operation, is one slice.
    """
    order = stage.operation.argsort(stable=True)
    counts = stage.operation.bincount(minlength=len(NAMES)).tolist()
    here, back = (part.to(images.device, non_blocking=True) for part in (order, order.argsort()))
    amount = stage.amount[order].to(images.device, non_blocking=True)
    size = (images.shape[2], images.shape[3])
    ordered, first = select_rows(images, here), 0  # several times faster than indexing on the CPU
    tables, moves = [], []
    table_rows, move_rows = [], []
    for name, count in zip(NAMES, counts, strict=True):
        rows = slice(first, first := first + count)
        if count and name in TABLES:
            tables.append(TABLES[name](ordered[rows], amount[rows]))
            table_rows.append(rows)
        elif count and name in MOVES:
            moves.append(MOVES[name](amount[rows], size))
            move_rows.append(rows)
        elif count and name in NEIGHBORS:
            ordered[rows] = NEIGHBORS[name](ordered[rows], amount[rows])
    if tables:
        rows = slice(table_rows[0].start, table_rows[-1].stop)  # contiguous: operations of one kind are adjacent
        ordered[rows] = look_up(ordered[rows], torch.cat(tables))
    if moves:
        rows = slice(move_rows[0].start, move_rows[-1].stop)
        ordered[rows] = resample(ordered[rows], torch.cat(moves))
    return select_rows(ordered, back)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _coin(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < 0.5


def _sign(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.where(_coin(shape, generator), 1.0, -1.0)


# RandAugment ---------------------------------------------------------------------------------------------------------

LEVELS = 10
POOL: tuple[tuple[str, Callable[[Tensor, Tensor, int, int], Tensor]], ...] = (
    ("autocontrast", lambda m, sign, height, width: m),
    ("brightness", lambda m, sign, height, width: 0.05 + 0.9 * m),
    ("saturation", lambda m, sign, height, width: 0.05 + 0.9 * m),
    ("contrast", lambda m, sign, height, width: 0.05 + 0.9 * m),
    ("equalize", lambda m, sign, height, width: m),
    ("identity", lambda m, sign, height, width: m),
    ("posterize", lambda m, sign, height, width: 4 + (4 * m).floor()),
    ("rotate", lambda m, sign, height, width: 30 * m * sign),
    ("sharpness", lambda m, sign, height, width: 0.05 + 0.9 * m),
    ("shear_x", lambda m, sign, height, width: 0.3 * m * sign),
    ("shear_y", lambda m, sign, height, width: 0.3 * m * sign),
    ("solarize", lambda m, sign, height, width: (256 * m).floor()),
    ("translate_x", lambda m, sign, height, width: (0.3 * m * width).round() * sign),
    ("translate_y", lambda m, sign, height, width: (0.3 * m * height).round() * sign),
)
"""FixMatch's fourteen operations (Sohn et al., NeurIPS 2020, Table 12): name, and amount at strength m = level / 10."""


def draw_rand_augment(
    batch: int, height: int, width: int, generator: torch.Generator, operations: int = 2
) -> list[Stage]:
    """Sample RandAugment as in FixMatch's PyTorch ports: each operation with probability 1/2, at a level of 1 to 9.

    Args:
        batch: B, number of images.
        height: height of the images in pixels.
        width: width of the images in pixels.
        generator: random generator, on the CPU.
        operations: number of stages, each sampled from the pool with replacement.

    Returns:
        The stages, to be applied in order.
    """
    numbers = torch.tensor([NUMBER[name] for name, _ in POOL])
    stages = []
    for _ in range(operations):
        place = torch.randint(len(POOL), (batch,), generator=generator)
        m = torch.randint(1, LEVELS, (batch,), generator=generator) / LEVELS
        sign, used = _sign((batch,), generator), _coin((batch,), generator)
        amounts = torch.stack([amount(m, sign, height, width) for _, amount in POOL])
        operation = torch.where(used, numbers[place], NUMBER["identity"])
        stages.append(Stage(operation, amounts.gather(0, place[None])[0]))
    return stages


# AutoAugment ---------------------------------------------------------------------------------------------------------

_SUB_POLICIES = (
    "invert .1 0, contrast .2 6", "rotate .7 2, translate_x .3 9", "sharpness .8 1, sharpness .9 3",
    "shear_y .5 8, translate_y .7 9", "autocontrast .5 0, equalize .9 0", "shear_y .2 7, posterize .3 7",
    "saturation .4 3, brightness .6 7", "sharpness .3 9, brightness .7 9", "equalize .6 0, equalize .5 0",
    "contrast .6 7, sharpness .6 5", "saturation .7 7, translate_x .5 8", "equalize .3 0, autocontrast .4 0",
    "translate_y .4 3, sharpness .2 6", "brightness .9 6, saturation .2 8", "solarize .5 2, invert 0 0",
    "equalize .2 0, autocontrast .6 0", "equalize .2 0, equalize .6 0", "saturation .9 9, equalize .6 0",
    "autocontrast .8 0, solarize .2 8", "brightness .1 3, saturation .7 0", "solarize .4 5, autocontrast .9 0",
    "translate_y .9 9, translate_y .7 9", "autocontrast .9 0, solarize .8 3", "equalize .8 0, invert .1 0",
    "translate_y .7 9, autocontrast .9 0",
)  # fmt: skip
CIFAR10_POLICY = tuple(
    tuple(
        (name, float(probability), int(level))
        for name, probability, level in (step.split() for step in sub.split(", "))
    )
    for sub in _SUB_POLICIES
)
"""AutoAugment's CIFAR-10 policy (Cubuk et al., CVPR 2019, Table 7): 25 pairs of (operation, probability, level 0-9)."""


def _auto_augment_amount(name: str, level: int, sign: Tensor, height: int, width: int) -> Tensor:
    """Return the amount of an operation at a level, shape of ``sign``, by the ranges of AutoAugment's Table 6."""
    part = level / 9
    if name in ("shear_x", "shear_y"):
        return 0.3 * part * sign
    if name in ("translate_x", "translate_y"):
        return math.floor(150 / 331 * (width if name == "translate_x" else height) * part) * sign
    if name == "rotate":
        return 30 * part * sign
    if name in ("brightness", "saturation", "contrast", "sharpness"):
        return 1 + 0.9 * part * sign
    unsigned = {"posterize": 8 - round(4 * part), "solarize": 255 * (1 - part)}.get(name, 0.0)
    return torch.full_like(sign, unsigned)


def draw_auto_augment(batch: int, height: int, width: int, generator: torch.Generator) -> list[Stage]:
    """Sample one of the 25 pairs of AutoAugment's policy for CIFAR-10 per image, each operation with its probability.

    Arguments are those of :func:`draw_rand_augment`.
    """
    pair = torch.randint(len(CIFAR10_POLICY), (batch,), generator=generator)
    stages = []
    for step in (0, 1):
        steps = [sub[step] for sub in CIFAR10_POLICY]
        sign, draw = _sign((batch,), generator), torch.rand((batch,), generator=generator)
        amounts = torch.stack([_auto_augment_amount(name, level, sign, height, width) for name, _, level in steps])
        used = draw < torch.tensor([probability for _, probability, _ in steps])[pair]
        numbers = torch.tensor([NUMBER[name] for name, _, _ in steps])
        stages.append(Stage(torch.where(used, numbers[pair], NUMBER["identity"]), amounts.gather(0, pair[None])[0]))
    return stages


# Color jitter, resized crops -----------------------------------------------------------------------------------------


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


def _auto_augment(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    images = _weak(images, generator, padding, flip)
    for stage in draw_auto_augment(len(images), images.shape[2], images.shape[3], generator):
        images = apply_stage(images, stage)
    return images


def _rand_augment(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Apply RandAugment, then cutout with a gray square of half the image's side."""
    images = _weak(images, generator, padding, flip)
    batch, height, width = len(images), images.shape[2], images.shape[3]
    for stage in draw_rand_augment(batch, height, width, generator):
        images = apply_stage(images, stage)
    row, column = (torch.randint(size, (batch,), generator=generator) for size in (height, width))
    row, column = row.to(images.device, non_blocking=True), column.to(images.device, non_blocking=True)
    return cutout(images, row, column, 2 * (height // 4))


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
    return resample(images, matrix.to(images.device, non_blocking=True), crop, padding)


def _simclr(images: Tensor, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Apply a resized crop of .2 to 1 of the area, flip, color jitter (p = .8) and grayscale (p = .2); no blur."""
    batch, device = len(images), images.device
    window = draw_resized_crop(batch, images.shape[2], images.shape[3], 0.2, generator)
    images = resized_crop(images, *(part.to(device, non_blocking=True) for part in window))
    flipped = _coin((batch,), generator).to(device, non_blocking=True)
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
    "rand_augment": _rand_augment,
    "jitter_affine": _jitter_affine,
    "simclr": _simclr,
}
"""Name -> function (images, generator, padding, flip). Sources: AutoAugment (Cubuk et al., CVPR 2019, CIFAR-10 policy)
and RandAugment as in FixMatch, each after crop and flip; SimCLR (Chen et al., ICML 2020); the warm-up views of C2D's
code: color jitter before crop and flip, an affine transform after them."""


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
        images: shape (B, 3, H, W), uint8. Not modified.
        policy: a name in :data:`POLICIES`.
        generator: random generator, on the CPU; torch's global stream is not used.
        padding: pixels of zero padding for the crop, in policies that crop.
        flip: whether policies that crop also flip horizontally.
        size: h, w of the views, at most those of the images. Larger images are cropped at random positions before the
            policy (``none``: at the center); ``simclr`` crops from the whole image and resizes the view.

    Returns:
        Views, shape (B, 3, h, w), uint8, on the device of the images.

    Raises:
        ValueError: if the policy is unknown, or the size is larger than the images.
    """
    if policy not in POLICIES:
        raise ValueError(f"expected a view among {', '.join(POLICIES)}, got {policy!r}; choose one of them")
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
    """Crop images (B, 3, H, W) to ``size`` (h, w) at the center."""
    top, left = (rest // 2 for rest in _rest(images, size))
    return images[:, :, top : top + size[0], left : left + size[1]]


def takes_batches(policy: Callable[..., Any]) -> bool:
    """Return whether a policy takes (uint8 images, generator); others transform one image, as in torchvision."""
    try:
        return "generator" in inspect.signature(policy).parameters
    except (TypeError, ValueError):
        return False
