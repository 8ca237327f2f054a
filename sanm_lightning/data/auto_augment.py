"""AutoAugment's policy for CIFAR-10, as published and in the forms of the PyTorch port that released codes use.

Sources: Cubuk et al., CVPR 2019, Tables 6 and 7; github.com/DeepVoltaire/AutoAugment, used by the code of SANM; a copy of it
in github.com/MrChenFeng/SSR_BMVC2022, used by the code of SSR.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from sanm_lightning.data.stages import NUMBER, Stage, coin

__all__ = ["CIFAR10_POLICY", "GRAY", "SSR_POLICY", "Form", "draw_auto_augment", "steps_of_pairs"]

Form = Literal["published", "released", "ssr"]
Step = tuple[str, float, int]

GRAY = 128
"""Gray value outside of the image in the released forms; as published, it is 0."""

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


def _steps(pair: str) -> tuple[Step, ...]:
    parts = (step.split() for step in pair.split(", "))
    return tuple((name, float(probability), int(level)) for name, probability, level in parts)


CIFAR10_POLICY = tuple(_steps(pair) for pair in _SUB_POLICIES)
"""AutoAugment's CIFAR-10 policy (Cubuk et al., CVPR 2019, Table 7): 25 pairs of (operation, probability, level 0-9)."""

SSR_POLICY = tuple(
    _steps("equalize .2 0, equalize .8 0") if pair == "equalize .2 0, equalize .6 0" else _steps(pair)
    for pair in _SUB_POLICIES
)
"""The policy in the code of SSR, which differs from :data:`CIFAR10_POLICY` in the probability of one ``equalize``."""


def _amounts(name: str, level: int, height: int, width: int, released: bool) -> tuple[float, float]:
    """Return the amounts (minus, plus) of an operation at a level, by the ranges of AutoAugment's Table 6.

    The port differs from torchvision in three places: translations are rounded to the nearest pixel instead of down,
    rotations have one direction, and the threshold of ``solarize`` starts at 256 instead of 255.
    """
    part = level / 9
    if name in ("shear_x", "shear_y"):
        return -0.3 * part, 0.3 * part
    if name in ("translate_x", "translate_y"):
        pixels = 150 / 331 * (width if name == "translate_x" else height) * part
        whole = math.floor(pixels + 0.5) if released else math.floor(pixels)
        return -whole, whole
    if name == "rotate":
        return (30 * part if released else -30 * part), 30 * part
    if name in ("brightness", "saturation", "contrast", "sharpness"):
        return 1 - 0.9 * part, 1 + 0.9 * part
    unsigned = {"posterize": 8 - round(4 * part), "solarize": (256 if released else 255) * (1 - part)}.get(name, 0.0)
    return unsigned, unsigned


@lru_cache(maxsize=32)
def steps_of_pairs(form: Form, step: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers (25,), probabilities (25,) and amounts (25, 2) of the operations of one step of all pairs."""
    released = form != "published"
    steps = [pair[step] for pair in (SSR_POLICY if form == "ssr" else CIFAR10_POLICY)]
    names = [f"{name}_bicubic" if released and name.startswith("shear") else name for name, _, _ in steps]
    amounts = [_amounts(name, level, height, width, released) for name, _, level in steps]
    probabilities = torch.tensor([probability for _, probability, _ in steps])
    return torch.tensor([NUMBER[name] for name in names]), probabilities, torch.tensor(amounts, dtype=torch.float32)


def draw_auto_augment(
    batch: int, height: int, width: int, generator: torch.Generator, form: Form = "published"
) -> list[Stage]:
    """Sample one of the 25 pairs of AutoAugment's policy for CIFAR-10 per image, each operation with its probability.

    Args:
        batch: B, number of images.
        height: height of the images in pixels.
        width: width of the images in pixels.
        generator: random generator, on the CPU.
        form: ``"published"``, equal to torchvision's ``AutoAugment``; ``"released"``, the PyTorch port: bicubic shears,
            translations rounded to the nearest pixel, rotations in one direction, to be applied with the fill
            :data:`GRAY`; or ``"ssr"``, the port with :data:`SSR_POLICY`.

    Returns:
        The stages, to be applied in order.
    """
    pair = torch.randint(len(CIFAR10_POLICY), (batch,), generator=generator)
    stages = []
    for step in (0, 1):
        numbers, probabilities, amounts = steps_of_pairs(form, step, height, width)
        plus, draw = coin((batch,), generator), torch.rand((batch,), generator=generator)
        operation = torch.where(draw < probabilities[pair], numbers[pair], NUMBER["identity"])
        stages.append(Stage(operation, amounts[pair, plus.long()]))
    return stages
