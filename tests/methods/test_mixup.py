"""Mixup: rows stay mixtures of two, and more can be mixed alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sanm_lightning.functional import mixup


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(6, 3, 4, 4, generator=generator), torch.rand(6, 5, generator=generator).softmax(1), generator


@given(st.integers(0, 1000), st.floats(0.1, 8), st.booleans())
def test_every_row_is_a_mixture_of_itself_and_its_partner(seed, alpha, larger_half):
    images, targets, generator = batch(seed)
    mixed = mixup(images, targets, generator, alpha, larger_half)
    assert (0.5 if larger_half else 0.0) <= mixed.lam <= 1
    assert sorted(mixed.partners.tolist()) == list(range(6))
    for i, partner in enumerate(mixed.partners.tolist()):
        torch.testing.assert_close(mixed.images[i], mixed.lam * images[i] + (1 - mixed.lam) * images[partner])
        torch.testing.assert_close(mixed.targets[i], mixed.lam * targets[i] + (1 - mixed.lam) * targets[partner])
    torch.testing.assert_close(mixed.mix(targets), mixed.targets)


def test_alpha_zero_mixes_nothing():
    images, targets, generator = batch()
    mixed = mixup(images, targets, generator, 0.0)
    assert torch.equal(mixed.images, images)
    assert torch.equal(mixed.targets, targets)


def test_weights_follow_the_beta_distribution():
    images, targets, generator = batch()
    shares = torch.tensor([mixup(images[:1], targets[:1], generator, 4.0, False).lam for _ in range(4000)])
    assert abs(float(shares.mean()) - 0.5) < 0.01
    assert abs(float(shares.var()) - 1 / 36) < 0.003  # 1 / (4 (2 alpha + 1))


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha >= 0, got -1"):
        mixup(*batch(), -1.0)
