"""Augmentation policies: shapes, streams, published probabilities."""

import pytest
import torch

from sanm_lightning.data.policies import _POOL, POLICIES, augment
from sanm_lightning.data.views import crop_flip, draw_crop_flip


def images(count: int = 6) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_view_is_a_function_of_its_generator(policy):
    given = images()
    before = given.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, again, other = (augment(given, policy, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "the global stream was drawn from"
    assert torch.equal(given, before)
    assert one.shape == given.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, again)
    assert torch.equal(one, other) == (policy == "none")


def test_weak_is_crop_and_flip():
    drawn = draw_crop_flip(6, 2, True, torch.Generator().manual_seed(5))
    expected = crop_flip(images(), drawn, 2)
    assert torch.equal(augment(images(), "weak", torch.Generator().manual_seed(5), 2, True), expected)


def test_an_empty_batch_stays_empty():
    assert len(augment(images(0), "rand_augment", torch.Generator())) == 0


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="got 'strong'"):
        augment(images(), "strong", torch.Generator())


def test_rand_augment_always_leaves_a_grey_square():
    views = augment(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), "rand_augment", torch.Generator().manual_seed(0), 0, False)
    for view in views:
        grey = (view == 127).all(0)
        rows, columns = grey.any(1).sum(), grey.any(0).sum()
        assert 8 <= int(rows) <= 16
        assert 8 <= int(columns) <= 16
        assert int(grey.sum()) == int(rows * columns)


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_every_operation_of_the_pool_keeps_shape_and_type(strength):
    assert len(_POOL) == 14
    for operation in _POOL:
        out = operation(images(1)[0], strength)
        assert out.shape == (3, 32, 32)
        assert out.dtype == torch.uint8


def test_simclr_greys_a_fifth_of_the_views():
    coloured = torch.zeros(600, 3, 8, 8, dtype=torch.uint8)
    coloured[:, 0], coloured[:, 1] = 200, 90
    views = augment(coloured, "simclr", torch.Generator().manual_seed(0))
    grey = ((views[:, 0] == views[:, 1]) & (views[:, 1] == views[:, 2])).all(2).all(1).double().mean()
    assert 0.14 < float(grey) < 0.26
