"""RandAugment: every operation, level and sign against Pillow on single images, and the published probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.views import POOL as PILLOW
from benchmarks.views import gray_square
from sanm_lightning.data.policies import augment
from sanm_lightning.data.rand_augment import POOL, amounts_of_levels, cut_square, draw_cutout, draw_rand_augment
from sanm_lightning.data.stages import NAMES, NUMBER, Stage, apply_stage
from sanm_lightning.data.views import crop_flip, draw_crop_flip

MANY = 60_000
LEVELS = range(1, 10)
BLENDS = ("autocontrast", "saturation", "contrast", "sharpness")
"""Operations that may differ from Pillow's by one gray level."""


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Noise, and as many smooth images."""
    noise = torch.rand(count, 3, height, width, generator=stream())
    coarse = torch.rand(count, 3, 4, 4, generator=stream(1))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (torch.cat([noise, smooth]) * 255).round().to(torch.uint8)


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TestOperations:
    @pytest.mark.parametrize("size", [(32, 32), (40, 24)], ids=["square", "not square"])
    @pytest.mark.parametrize("name", PILLOW)
    def test_every_level_and_sign_equals_pillow(self, name, size):
        given = images(4, *size)
        amounts = amounts_of_levels(*size)[[known for known, _ in POOL].index(name)]
        for level in LEVELS:
            for sign, amount in zip((-1, 1), amounts[level - 1], strict=True):
                stage = Stage(torch.full((len(given),), NUMBER[name]), amount.expand(len(given)))
                expected = torch.stack([tensor(PILLOW[name](pillow(image), level, sign)) for image in given])
                difference = (apply_stage(given, stage).int() - expected.int()).abs()
                assert int(difference.max()) <= (1 if name in BLENDS else 0), (level, sign)

    def test_translations_at_32_pixels_are_0_to_8_pixels(self):
        amounts = dict(zip([name for name, _ in POOL], amounts_of_levels(32, 32).tolist(), strict=True))
        for name in ("translate_x", "translate_y"):
            assert amounts[name] == [[-pixels, pixels] for pixels in range(9)]


class TestDraws:
    def test_each_of_fourteen_is_equally_likely_and_half_of_them_are_used(self):
        assert len(POOL) == len({name for name, _ in POOL}) == 14
        for stage in draw_rand_augment(MANY, 32, 32, stream()):
            counts = stage.operation.bincount(minlength=len(NAMES)) / MANY
            drawn = dict(zip(NAMES, counts.tolist(), strict=True))
            assert drawn["identity"] == pytest.approx(0.5 + 0.5 / 14, abs=0.01)
            for name, _ in POOL:
                if name != "identity":
                    assert drawn[name] == pytest.approx(0.5 / 14, abs=0.004)

    def test_levels_and_signs_are_equally_likely(self):
        (stage, _) = draw_rand_augment(MANY, 32, 32, stream())
        for name in ("rotate", "shear_x", "translate_y"):
            drawn = stage.amount[stage.operation == NUMBER[name]]
            amounts = amounts_of_levels(32, 32)[[known for known, _ in POOL].index(name)]
            for level in LEVELS:
                for amount in set(amounts[level - 1].tolist()):  # the translation of level 1 is 0 in both directions
                    expected = 1 / 9 if amount == 0 else 1 / 18
                    assert float((drawn == amount).double().mean()) == pytest.approx(expected, abs=0.02)

    def test_the_pixel_of_the_cutout_is_uniform(self):
        for drawn, size in zip(draw_cutout(MANY, 32, 24, stream()), (32, 24), strict=True):
            shares = drawn.bincount() / MANY
            assert len(shares) == size
            torch.testing.assert_close(shares, torch.full((size,), 1 / size), atol=0.005, rtol=0)


class TestCutout:
    @pytest.fixture
    def gray(self) -> torch.Tensor:
        """Return the squares around each pixel of 32 x 32, shape (1024, 32, 32)."""
        row, column = (part.flatten() for part in torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij"))
        views = cut_square(torch.zeros(1024, 3, 32, 32, dtype=torch.uint8), row, column)
        assert set(views.unique().tolist()) == {0, 127}
        return (views == 127).all(1)

    def test_around_every_pixel_it_equals_pillows_rectangle(self, gray):
        blank = Image.new("RGB", (32, 32))
        for place, square in enumerate(gray):
            row, column = divmod(place, 32)
            for part in (0.0, 0.999):  # the port samples points; all points of a pixel give the same square
                expected = tensor(gray_square(blank, column + part, row + part))
                assert torch.equal(square, (expected == 127).all(0)), (row, column)

    def test_it_covers_the_share_of_the_port(self, gray):
        # rows 0 to 8 give the first 17 rows, rows 9 to 23 give 17 rows, rows 24 to 31 give 16 to 9 rows
        covered = (9 * 17 + 15 * 17 + sum(range(9, 17))) / 32**2
        assert float(gray.double().mean()) == pytest.approx(covered**2)
        assert covered**2 == pytest.approx(0.246, abs=5e-4)

    def test_it_hides_the_middle_pixel_with_the_probability_of_the_port(self, gray):
        assert float(gray[:, 16, 16].double().mean()) == pytest.approx((25 / 32) ** 2)  # .61
        assert float(gray[:, 15, 15].double().mean()) == pytest.approx((24 / 32) ** 2)

    def test_its_side_follows_the_shorter_side_of_the_image(self):
        view = cut_square(torch.zeros(1, 3, 48, 20, dtype=torch.uint8), torch.tensor([30]), torch.tensor([9]))
        gray = (view[0] == 127).all(0)
        assert gray.any(1).nonzero().flatten().tolist() == list(range(25, 36))
        assert gray.any(0).nonzero().flatten().tolist() == list(range(4, 15))


def test_the_policy_is_crop_and_flip_then_two_stages_then_the_cutout():
    given, generator = images(20), stream(3)
    expected = crop_flip(given, draw_crop_flip(40, 4, True, generator), 4)
    for stage in draw_rand_augment(40, 32, 32, generator):
        expected = apply_stage(expected, stage)
    expected = cut_square(expected, *draw_cutout(40, 32, 32, generator))
    assert torch.equal(augment(given, "rand_augment", stream(3)), expected)
