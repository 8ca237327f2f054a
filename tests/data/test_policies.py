"""Augmentation policies: shapes, streams, published probabilities."""

import pytest
import torch
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from sanm_lightning.data.operations import OPERATIONS
from sanm_lightning.data.policies import (
    CIFAR10_POLICY,
    NAMES,
    POLICIES,
    POOL,
    Stage,
    apply_stage,
    augment,
    draw_auto_augment,
    draw_color_jitter,
    draw_rand_augment,
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


def test_a_stage_is_its_operations_one_image_after_the_other():
    generator = stream(1)
    stage = Stage(torch.randint(len(NAMES), (40,), generator=generator), torch.rand(40, generator=generator))
    given = images(40)
    views = apply_stage(given, stage)
    for image, view, number, amount in zip(given, views, *stage, strict=True):
        assert torch.equal(view, OPERATIONS[NAMES[number]](image[None], amount[None])[0])


class TestRandAugment:
    def test_draws_each_of_fourteen_alike_and_uses_half_of_them(self):
        assert len(POOL) == len({name for name, _ in POOL}) == 14
        for stage in draw_rand_augment(MANY, 32, 32, stream()):
            drawn = shares(stage)
            assert drawn["identity"] == pytest.approx(0.5 + 0.5 / 14, abs=0.01)
            for name, _ in POOL:
                if name != "identity":
                    assert drawn[name] == pytest.approx(0.5 / 14, abs=0.004)

    def test_draws_nine_levels_and_both_signs(self):
        (stage, _) = draw_rand_augment(MANY, 40, 32, stream())
        amounts = {name: stage.amount[stage.operation == NAMES.index(name)].unique() for name in NAMES}
        levels = torch.arange(1, 10) / 10
        torch.testing.assert_close(amounts["brightness"], 0.05 + 0.9 * levels)
        torch.testing.assert_close(amounts["rotate"], torch.cat([-30 * levels.flip(0), 30 * levels]))
        assert amounts["posterize"].tolist() == [4, 5, 6, 7]
        assert amounts["solarize"].tolist() == [int(256 * level) for level in levels.tolist()]
        assert amounts["translate_x"].max() == round(0.27 * 32)
        assert amounts["translate_y"].min() == -round(0.27 * 40)

    def test_always_leaves_a_grey_square(self):
        views = augment(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), "rand_augment", stream(), 0, False)
        for view in views:
            grey = (view == 127).all(0)
            rows, columns = grey.any(1).sum(), grey.any(0).sum()
            assert 8 <= int(rows) <= 16
            assert 8 <= int(columns) <= 16
            assert int(grey.sum()) == int(rows * columns)


class TestAutoAugment:
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

    def test_draws_each_pair_alike_and_each_step_with_its_probability(self):
        for step, stage in enumerate(draw_auto_augment(MANY, 32, 32, stream())):
            expected = dict.fromkeys(NAMES, 0.0)
            for pair in CIFAR10_POLICY:
                name, probability, _ = pair[step]
                expected[name] += probability / 25
                expected["identity"] += (1 - probability) / 25
            drawn = shares(stage)
            for name in NAMES:
                assert drawn[name] == pytest.approx(expected[name], abs=0.006)

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
