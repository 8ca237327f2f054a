"""GCE: its loss against a slow loop, its two limits, and its gradient."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning.functional import generalized_cross_entropy
from sanm_lightning.methods import GCE


def test_the_loss_against_a_loop_over_the_expectation():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 3), torch.rand(5, 3).softmax(1)
    for z, t, got in zip(
        logits.tolist(), targets.tolist(), generalized_cross_entropy(logits, targets, 0.7), strict=True
    ):
        total = sum(math.exp(value) for value in z)
        expected = sum(w * (1 - (math.exp(value) / total) ** 0.7) / 0.7 for w, value in zip(t, z, strict=True))
        assert float(got) == pytest.approx(expected, rel=1e-5)


def test_at_one_it_is_the_absolute_error_and_towards_zero_cross_entropy():
    torch.manual_seed(1)
    logits, targets = torch.randn(6, 4), F.one_hot(torch.arange(6) % 4, 4).float()
    probability = (logits.softmax(1) * targets).sum(1)
    torch.testing.assert_close(generalized_cross_entropy(logits, targets, 1.0), 1 - probability)
    torch.testing.assert_close(
        generalized_cross_entropy(logits, targets, 1e-3), -probability.log(), rtol=1e-2, atol=1e-3
    )


def test_the_gradient_is_finite_where_the_probability_of_the_label_underflows():
    logits = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    generalized_cross_entropy(logits, torch.tensor([[1.0, 0.0]]), 0.7).sum().backward()
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("q", [0.0, 1.5, -1.0])
def test_q_out_of_range_is_refused(q):
    with pytest.raises(ValueError, match=r"expected q in \(0, 1\], got"):
        GCE(4, q=q)
    with pytest.raises(ValueError, match=r"expected q in \(0, 1\], got"):
        generalized_cross_entropy(torch.zeros(1, 2), torch.ones(1, 2), q)
