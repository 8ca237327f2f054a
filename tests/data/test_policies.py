"""Augmentation policies: shapes, streams, published probabilities."""

import pytest
import torch

from sanm_lightning.data import stages
from sanm_lightning.data.operations import OPERATIONS
from sanm_lightning.data.policies import (
    NAMES,
    POLICIES,
    Stage,
    apply_stage,
    augment,
    draw_color_jitter,
    draw_resized_crop,
)
from sanm_lightning.data.views import crop_flip, draw_crop_flip

MANY = 60_000


def images(count: int = 6) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(stage: Stage) -> dict[str, float]:
    """How often each operation was drawn."""
    counts = stage.operation.bincount(minlength=len(NAMES)) / len(stage.operation)
    return dict(zip(NAMES, counts.tolist(), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_view_is_a_function_of_its_generator(policy):
    given = images()
    before = given.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, again, other = (augment(given, policy, stream(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "the global stream was drawn from"
    assert torch.equal(given, before)
    assert one.shape == given.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (policy == "none")


def test_weak_is_crop_and_flip():
    expected = crop_flip(images(), draw_crop_flip(6, 2, True, stream(5)), 2)
    assert torch.equal(augment(images(), "weak", stream(5), 2, True), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_batch_stays_empty(policy):
    assert len(augment(images(0), policy, stream())) == 0


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="got 'strong'"):
        augment(images(), "strong", stream())


@pytest.mark.parametrize("cached", [1, 3 * 3 * 32 * 32, stages.CACHED])
def test_a_stage_is_its_operations_one_image_after_the_other(cached, monkeypatch):
    monkeypatch.setattr(stages, "CACHED", cached)  # parts of one image, of three images, and whole batches
    generator = stream(1)
    stage = Stage(torch.randint(len(NAMES), (40,), generator=generator), torch.rand(40, generator=generator))
    given = images(40)
    views = apply_stage(given, stage)
    for image, view, number, amount in zip(given, views, *stage, strict=True):
        assert torch.equal(view, OPERATIONS[NAMES[number]](image[None], amount[None])[0])


def test_a_stage_fills_the_outside_of_geometric_operations_with_gray():
    white = torch.full((6, 3, 16, 16), 255, dtype=torch.uint8)
    names = ("rotate", "shear_x", "translate_y", "shear_x_bicubic", "shear_y_bicubic", "invert")
    amounts = torch.tensor([20.0, 0.3, 5.0, 0.3, -0.3, 0.0])
    stage = Stage(torch.tensor([NAMES.index(name) for name in names]), amounts)
    *moved, inverted = apply_stage(white, stage, fill=128)
    for view, black in zip(moved, apply_stage(white, stage), strict=False):
        assert set(view.unique().tolist()) == {128, 255}
        assert torch.equal(view == 128, black == 0)
    assert set(inverted.unique().tolist()) == {0}


class TestColorJitter:
    def test_applies_each_of_four_once_in_any_order(self):
        stages = draw_color_jitter(MANY, 0.4, 0.1, stream())
        order = torch.stack([stage.operation for stage in stages])
        assert {tuple(sorted(row)) for row in order.T.unique(dim=0).tolist()} == {
            tuple(sorted(NAMES.index(name) for name in ("brightness", "contrast", "saturation", "hue")))
        }
        assert len(order.T.unique(dim=0)) == 24
        for stage in stages:
            hue = stage.operation == NAMES.index("hue")
            assert -0.1 <= float(stage.amount[hue].min()) < -0.095 and 0.095 < float(stage.amount[hue].max()) <= 0.1
            assert 0.6 <= float(stage.amount[~hue].min()) < 0.61 and 1.39 < float(stage.amount[~hue].max()) <= 1.4

    def test_leaves_an_image_alone_as_often_as_asked(self):
        for stage in draw_color_jitter(MANY, 0.4, 0.1, stream(), 0.8):
            assert shares(stage)["identity"] == pytest.approx(0.2, abs=0.01)


class TestResizedCrop:
    @pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 20), (10, 300)])
    def test_windows_lie_inside_and_have_the_asked_area_and_aspect(self, height, width):
        top, left, rows, columns = (part.double() for part in draw_resized_crop(MANY, height, width, 0.2, stream()))
        assert (top >= 0).all() and (left >= 0).all() and (rows >= 1).all() and (columns >= 1).all()
        assert (top + rows <= height).all() and (left + columns <= width).all()
        if height == width:
            share, aspect = rows * columns / (height * width), columns / rows
            assert float(share.min()) > 0.17 and 0.99 <= float(share.max()) <= 1
            assert 0.68 < float(aspect.min()) < 0.76 and 1.32 < float(aspect.max()) < 1.46
            assert float(top.max()) > 15 and float(left.max()) > 15

    def test_where_none_fits_the_largest_in_the_middle_is_taken(self):
        top, left, rows, columns = draw_resized_crop(50, 10, 300, 0.9, stream())
        assert set(rows.tolist()) == {10} and set(columns.tolist()) == {13}
        assert set(top.tolist()) == {0} and set(left.tolist()) == {143}


def test_simclr_greys_a_fifth_of_the_views():
    coloured = torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    coloured[:, 0], coloured[:, 1] = 200, 90
    views = augment(coloured, "simclr", stream())
    grey = ((views[:, 0] == views[:, 1]) & (views[:, 1] == views[:, 2])).all(2).all(1).double().mean()
    assert 0.14 < float(grey) < 0.26
