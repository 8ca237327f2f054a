"""AutoAugment: as published against torchvision, in the released forms against Pillow on single images."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from sanm_lightning.data.auto_augment import CIFAR10_POLICY, SSR_POLICY, draw_auto_augment, steps_of_pairs
from sanm_lightning.data.policies import augment
from sanm_lightning.data.stages import NAMES, NUMBER, Stage, apply_stage
from sanm_lightning.data.views import crop_flip, draw_crop_flip

MANY = 60_000
FORMS = [("published", CIFAR10_POLICY), ("released", CIFAR10_POLICY), ("ssr", SSR_POLICY)]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Noise, and as many smooth images."""
    noise = torch.rand(count, 3, height, width, generator=stream())
    coarse = torch.rand(count, 3, 4, 4, generator=stream(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (torch.cat([noise, smooth]) * 255).round().to(torch.uint8)


class TestDraws:
    @pytest.mark.parametrize(("form", "policy"), FORMS)
    def test_each_pair_is_equally_likely_and_each_step_has_its_probability(self, form, policy):
        for step, stage in enumerate(draw_auto_augment(MANY, 32, 32, stream(), form)):
            expected = dict.fromkeys(NAMES, 0.0)
            for pair in policy:
                name, probability, _ = pair[step]
                if form != "published" and name.startswith("shear"):
                    name += "_bicubic"
                expected[name] += probability / 25
                expected["identity"] += (1 - probability) / 25
            drawn = stage.operation.bincount(minlength=len(NAMES)) / MANY
            for name, share in zip(NAMES, drawn.tolist(), strict=True):
                assert share == pytest.approx(expected[name], abs=0.006)

    def test_both_signs_are_equally_likely(self):
        (_, stage) = draw_auto_augment(MANY, 32, 32, stream(), "released")
        drawn = stage.amount[stage.operation == NUMBER["translate_y"]]
        assert float((drawn > 0).double().mean()) == pytest.approx(0.5, abs=0.03)


class TestPublished:
    theirs = {
        "Color": "saturation",
        "AutoContrast": "autocontrast",
        "ShearX": "shear_x",
        "ShearY": "shear_y",
        "TranslateX": "translate_x",
        "TranslateY": "translate_y",
    }

    def test_is_the_policy_that_torchvision_has(self):
        published = AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
        expected = [tuple((self.theirs.get(n, n.lower()), p, level or 0) for n, p, level in pair) for pair in published]
        assert expected == list(CIFAR10_POLICY)

    @pytest.mark.parametrize("size", [(32, 32), (48, 24)])
    def test_draws_the_amounts_that_torchvision_takes(self, size):
        theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)
        for step, stage in enumerate(draw_auto_augment(MANY, *size, stream())):
            expected: dict[str, set[float]] = {}
            for pair in theirs._policies:
                name, probability, level = pair[step]
                bins, signed = theirs._AUGMENTATION_SPACE[name]
                ours = self.theirs.get(name, name.lower())
                if level is None or probability == 0:
                    continue
                amount = float(bins(10, *size)[level])
                if name.startswith("Translate"):
                    amount = int(amount)
                if name == "Solarize":
                    amount *= 255
                for sign in (1, -1) if signed else (1,):
                    shift = 1 if ours in ("brightness", "saturation", "contrast", "sharpness") else 0
                    expected.setdefault(ours, set()).add(shift + sign * amount)
            for name, amounts in expected.items():
                drawn = stage.amount[stage.operation == NAMES.index(name)].unique().tolist()
                assert drawn == pytest.approx(sorted(amounts), abs=1e-4)


def released(image: Image.Image, name: str, level: int, sign: int) -> Image.Image:
    """Apply an operation at a level of 0 to 9 with Pillow, in the form of the PyTorch port."""
    gray = (128, 128, 128)

    def affine(*matrix: float, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=gray)

    slope, pixels, factor = (np.linspace(0, end, 10)[level] * sign for end in (0.3, 150 / 331, 0.9))
    bicubic = Image.Resampling.BICUBIC
    return {
        "shear_x": lambda: affine(1, slope, 0, 0, 1, 0, resample=bicubic),
        "shear_y": lambda: affine(1, 0, 0, slope, 1, 0, resample=bicubic),
        "translate_x": lambda: affine(1, 0, -pixels * image.width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, -pixels * image.height),
        "rotate": lambda: image.rotate(np.linspace(0, 30, 10)[level], fillcolor=gray),
        "saturation": lambda: ImageEnhance.Color(image).enhance(1 + factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + factor),
        "posterize": lambda: ImageOps.posterize(image, round(np.linspace(8, 4, 10)[level])),
        "solarize": lambda: ImageOps.solarize(image, np.linspace(256, 0, 10)[level]),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }[name]()


STEPS = {
    (name, level): (pair, step)
    for pair, steps in enumerate(CIFAR10_POLICY)
    for step, (name, _, level) in enumerate(steps)
}
"""(name, level) of all operations in the policy -> where it is."""


class TestReleased:
    @pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=["square", "not square"])
    @pytest.mark.parametrize(("name", "level"), STEPS)
    def test_every_operation_level_and_sign_equals_pillow(self, name, level, size):
        given = images(6, *size)
        pair, step = STEPS[name, level]
        numbers, _, amounts = steps_of_pairs("released", step, *size)
        for sign, amount in zip((-1, 1), amounts[pair], strict=True):
            views = apply_stage(given, Stage(numbers[pair].expand(len(given)), amount.expand(len(given))), fill=128)
            expected = [
                np.array(released(Image.fromarray(image.permute(1, 2, 0).numpy()), name, level, sign))
                for image in given
            ]
            difference = (views.permute(0, 2, 3, 1).int() - torch.from_numpy(np.stack(expected)).int()).abs()
            if name.startswith("shear"):  # sums that are whole numbers, rounded down in float32 and in Pillow's float64
                assert float((difference > 0).double().mean()) <= 0.02
            blend = name in ("autocontrast", "saturation", "contrast", "sharpness") or name.startswith("shear")
            assert int(difference.max()) <= (1 if blend else 0), sign

    @pytest.mark.parametrize(
        ("name", "level", "pixels"), [("translate_y", 9, 15), ("translate_x", 8, 13), ("translate_y", 3, 5)]
    )
    def test_translations_are_rounded_to_the_nearest_pixel(self, name, level, pixels):
        pair, step = STEPS[name, level]
        assert steps_of_pairs("released", step, 32, 32)[2][pair].tolist() == [-pixels, pixels]

    def test_rotations_have_one_direction(self):
        pair, step = STEPS["rotate", 2]
        assert steps_of_pairs("released", step, 32, 32)[2][pair].tolist() == pytest.approx([20 / 3, 20 / 3])

    def test_the_policy_of_ssr_has_another_probability_of_one_equalize(self):
        different = [
            (ours, theirs)
            for pairs in zip(CIFAR10_POLICY, SSR_POLICY, strict=True)
            for ours, theirs in zip(*pairs, strict=True)
            if ours != theirs
        ]
        assert different == [(("equalize", 0.6, 0), ("equalize", 0.8, 0))]
        assert SSR_POLICY[16] == (("equalize", 0.2, 0), ("equalize", 0.8, 0))


@pytest.mark.parametrize(
    ("policy", "form", "fill"),
    [("auto_augment", "published", 0), ("auto_augment_released", "released", 128), ("auto_augment_ssr", "ssr", 128)],
)
def test_a_policy_is_crop_and_flip_then_two_stages(policy, form, fill):
    given, generator = images(400), stream(3)  # enough for some that the policies of SANM's and SSR's codes part
    expected = crop_flip(given, draw_crop_flip(800, 4, True, generator), 4)
    for stage in draw_auto_augment(800, 32, 32, generator, form):
        expected = apply_stage(expected, stage, fill)
    assert torch.equal(augment(given, policy, stream(3)), expected)
