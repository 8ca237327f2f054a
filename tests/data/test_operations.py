"""Each batched operation against single images: color operations of torchvision, geometric operations of Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as V

from sanm_lightning.data.operations import OPERATIONS, affine, affine_matrix, cutout, resample, resized_crop
from sanm_lightning.data.views import CropFlip, crop_flip, draw_crop_flip

B = 24


@pytest.fixture(params=[(32, 32), (20, 13)], ids=["square", "not square"])
def images(request) -> torch.Tensor:
    """Noise, smooth images, and flat ones."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(B, 3, *request.param, generator=generator)
    coarse = torch.rand(B, 3, 3, 3, generator=generator)
    noise[8:16] = torch.nn.functional.interpolate(coarse, size=request.param, mode="bilinear")[8:16]
    noise[16:20] = noise[16:20, :, :1, :1]
    return (noise * 255).round().to(torch.uint8)


def drawn(low: float, high: float, seed: int = 1) -> torch.Tensor:
    return low + (high - low) * torch.rand(B, generator=torch.Generator().manual_seed(seed))


def moved(image: torch.Tensor, *matrix: float, resample: int = Image.Resampling.NEAREST, fill: int = 0) -> torch.Tensor:
    """Transform one image with Pillow; the matrix leads from the place in the view to that in the image."""
    given = Image.fromarray(image.permute(1, 2, 0).numpy())
    view = given.transform(given.size, Image.Transform.AFFINE, matrix, resample, fillcolor=(fill,) * 3)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def turned(image: torch.Tensor, degrees: float) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(degrees))).permute(2, 0, 1)


BICUBIC = Image.Resampling.BICUBIC


SINGLE = {
    "identity": (lambda x, a: x, (0, 1), 0),
    "autocontrast": (lambda x, a: V.autocontrast(x), (0, 1), 0),
    "equalize": (lambda x, a: V.equalize(x), (0, 1), 0),
    "invert": (lambda x, a: V.invert(x), (0, 1), 0),
    "grey": (lambda x, a: V.rgb_to_grayscale(x, 3), (0, 1), 0),
    "brightness": (V.adjust_brightness, (0, 2), 1),
    "saturation": (V.adjust_saturation, (0, 2), 1),
    "contrast": (V.adjust_contrast, (0, 2), 1),
    "sharpness": (V.adjust_sharpness, (0, 2), 1),
    "hue": (V.adjust_hue, (-0.5, 0.5), 1),
    "posterize": (lambda x, a: V.posterize(x, round(a)), (0, 8), 0),
    "solarize": (V.solarize, (0, 255), 0),
    "rotate": (turned, (-40, 40), 0),
    "shear_x": (lambda x, a: moved(x, 1, a, 0, 0, 1, 0), (-0.4, 0.4), 0),
    "shear_y": (lambda x, a: moved(x, 1, 0, 0, a, 1, 0), (-0.4, 0.4), 0),
    "shear_x_bicubic": (lambda x, a: moved(x, 1, a, 0, 0, 1, 0, resample=BICUBIC), (-0.4, 0.4), 1),
    "shear_y_bicubic": (lambda x, a: moved(x, 1, 0, 0, a, 1, 0, resample=BICUBIC), (-0.4, 0.4), 1),
    "translate_x": (lambda x, a: moved(x, 1, 0, -a, 0, 1, 0), (-9, 9), 0),
    "translate_y": (lambda x, a: moved(x, 1, 0, 0, 0, 1, -a), (-9, 9), 0),
}
"""Name -> function of one image and one amount, the range of amounts, grey levels that rounding may part."""


def near(views: torch.Tensor, expected: torch.Tensor, levels: int) -> None:
    """Compare bytes: all within ``levels``."""
    assert int((views.int() - expected.int()).abs().max()) <= levels


def test_every_operation_is_compared():
    assert set(SINGLE) == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_the_reference_image_by_image(name, images):
    single, (low, high), levels = SINGLE[name]
    amount = drawn(low, high)
    if name in ("posterize", "translate_x", "translate_y"):
        amount = amount.round()
    before = images.clone()
    views = OPERATIONS[name](images, amount)
    expected = torch.stack([single(image, float(a)) for image, a in zip(images, amount, strict=True)])
    assert views.dtype == torch.uint8
    near(views, expected, levels)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["brightness", "saturation", "contrast", "sharpness"])
def test_a_factor_of_one_changes_nothing(name, images):
    near(OPERATIONS[name](images, torch.ones(B)), images, 0 if name in ("brightness", "sharpness") else 1)


def test_images_too_small_to_be_smoothed_stay():
    tiny = torch.randint(256, (B, 3, 2, 5), dtype=torch.uint8)
    assert torch.equal(OPERATIONS["sharpness"](tiny, drawn(0, 2)), tiny)


def test_an_affine_map_of_all_parts_equals_torchvision_on_pillow_images(images):
    parts = [
        drawn(-30, 30, 1),
        drawn(-5, 5, 2).round(),
        drawn(-5, 5, 3).round(),
        drawn(0.6, 1.5, 4),
        drawn(-20, 20, 5),
        drawn(-20, 20, 6),
    ]
    expected = [
        V.affine(V.to_pil_image(image), float(a), [int(x), int(y)], float(s), [float(h), float(v)])
        for image, a, x, y, s, h, v in zip(images, *parts, strict=True)
    ]
    near(affine(images, *parts), torch.stack([V.pil_to_tensor(image) for image in expected]), 0)


@pytest.mark.parametrize("padding", [0, 4])
def test_a_crop_a_flip_and_an_affine_map_are_one_resampling(images, padding):
    crop = draw_crop_flip(B, padding, True, torch.Generator().manual_seed(3))
    parts = {"angle": drawn(-30, 30, 1), "translate_x": drawn(-5, 5, 2), "scale": drawn(0.6, 1.5, 4)}
    matrix = affine_matrix(**parts)
    assert torch.equal(resample(images, matrix, crop, padding), affine(crop_flip(images, crop, padding), **parts))


def test_outside_of_the_image_is_the_fill_and_the_padding_of_the_crop_is_black(images):
    matrix = affine_matrix(translate_x=torch.full((B,), 3.0))
    zero, one = torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.long)
    views = resample(images, matrix, CropFlip(zero, one, zero.bool()), 1, fill=128)  # one row of padding above
    assert (views[..., :3] == 128).all()
    assert (views[:, :, 0, 3:] == 0).all()
    assert torch.equal(views[:, :, 1:, 3:], images[:, :, :-1, :-3])


def test_under_autocast_pixels_come_from_where_they_did(images):
    parts = {"angle": drawn(-30, 30, 1), "scale": drawn(0.6, 1.5, 4)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = affine(images, **parts)
    assert torch.equal(cast, affine(images, **parts))


def test_a_resized_crop_equals_torchvision(images):
    height, width = images.shape[2:]
    rows, columns = drawn(1, height, 1).round().long(), drawn(1, width, 2).round().long()
    top, left = (drawn(0, 1, 3) * (height - rows + 1)).long(), (drawn(0, 1, 4) * (width - columns + 1)).long()
    views = resized_crop(images, top, left, rows, columns)
    for image, view, *window in zip(images, views, top, left, rows, columns, strict=True):
        asked = [int(part) for part in window]
        exact = V.resized_crop(image.float(), *asked, [height, width], antialias=True)
        assert float((view - exact).abs().max()) <= 0.51
        near(view, V.resized_crop(image, *asked, [height, width], antialias=True), 1)


def test_the_whole_image_is_a_resized_crop_of_itself(images):
    zero, ones = torch.zeros(B, dtype=torch.long), torch.ones(B, dtype=torch.long)
    assert torch.equal(resized_crop(images, zero, zero, ones * images.shape[2], ones * images.shape[3]), images)


@pytest.mark.parametrize("side", [8, 9])
def test_a_square_is_cut_out_and_clipped_at_the_border(images, side):
    height, width = images.shape[2:]
    row, column = drawn(0, height - 1).long(), drawn(0, width - 1, 2).long()
    views = cutout(images, row, column, side)
    for image, view, r, c in zip(images, views, row.tolist(), column.tolist(), strict=True):
        expected = image.clone()
        expected[:, max(0, r - 4) : r - 4 + side, max(0, c - 4) : c - 4 + side] = 127
        assert torch.equal(view, expected)
