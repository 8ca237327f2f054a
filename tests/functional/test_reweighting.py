"""Guessed labels and the reweighted loss of IEG against loops over samples."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning.functional import guessed_labels, reweighted_cross_entropy
from tests.methods.reference import softmax

B, C = 5, 3


def logits_of(seed: int) -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed)) * 3


class TestGuessedLabels:
    @pytest.mark.parametrize("count", [1, 2])
    def test_they_are_the_sharpened_mean_over_views_one_sample_at_a_time(self, count):
        views = [logits_of(seed) for seed in range(count)]
        found = guessed_labels(views, 0.5)
        for i in range(B):
            mean = [0.0] * C
            for view in views:
                scale = math.sqrt(sum(float(v) ** 2 for v in view.flatten()) / (B * C))
                for c, p in enumerate(softmax([float(v) / scale for v in view[i]])):
                    mean[c] += p / count
            squares = [p**2 for p in mean]
            assert found[i].tolist() == pytest.approx([s / sum(squares) for s in squares], rel=1e-4)

    def test_they_do_not_depend_on_the_scale_of_a_view_and_have_no_gradient(self):
        one, other = logits_of(0).requires_grad_(), logits_of(1)
        found = guessed_labels([one, other], 0.5)
        assert not found.requires_grad
        torch.testing.assert_close(guessed_labels([7 * one, other], 0.5), found)


class TestReweightedCrossEntropy:
    def arguments(self):
        labels, guesses = F.one_hot(torch.arange(B) % C, C).float(), logits_of(2).softmax(1)
        return labels, guesses, torch.tensor([1.0, 0, 1, 0, 0]), torch.tensor([0.5, 0.0, 0.1, 0.2, 0.0])

    def test_it_is_the_loop_over_samples(self):
        logits, (labels, guesses, chosen, weights) = logits_of(3), self.arguments()
        expected = 0.0
        for i in range(B):
            log_p = [math.log(p) for p in softmax(logits[i].tolist())]
            for c in range(C):
                used = float(labels[i, c] if chosen[i] else guesses[i, c])
                mixed = 0.9 * float(labels[i, c]) + 0.1 * float(guesses[i, c])
                expected -= (used / B + float(weights[i]) * mixed) * log_p[c] / 2
        found = reweighted_cross_entropy(logits, labels, guesses, chosen, weights, 0.9)
        assert float(found) == pytest.approx(expected, rel=1e-5)

    def test_with_given_labels_and_equal_weights_it_is_cross_entropy(self):
        logits, (labels, guesses, *_) = logits_of(3), self.arguments()
        found = reweighted_cross_entropy(logits, labels, guesses, torch.ones(B), torch.full((B,), 1 / B), 1.0)
        torch.testing.assert_close(found, F.cross_entropy(logits, labels.argmax(1)))
