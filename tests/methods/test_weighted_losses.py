"""Mixup, truncated GCE, loss correction and ActiveBias against loops over samples and classes, and in their limits."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.functional import (
    backward_correction,
    estimate_transition,
    forward_correction,
    generalized_cross_entropy,
    label_posterior,
    mixup,
    prior_kl,
    truncated_generalized_cross_entropy,
    uncertainty_weights,
)
from sanm_lightning.methods import GCE, ActiveBias, CrossEntropy, ForwardCorrection, Mixup
from tests.methods.reference import SMALL, C, N, batch, predictions, ready, softmax

T = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.8, 0.2, 0.0], [0.3, 0.0, 0.6, 0.1], [0.1, 0.1, 0.2, 0.6]])


class TestMixup:
    def test_the_loss_is_that_of_the_mixed_images_with_both_labels(self):
        torch.manual_seed(0)
        module, given = ready(Mixup(**SMALL, alpha=2.0)), batch()
        loss = module.training_step(given, 0)
        mixed = mixup(given.images, F.one_hot(given.labels, C).float(), module.stream("mixup"), 2.0, larger_half=False)
        expected = 0.0
        for i, p in enumerate(predictions(module.network, mixed.images)):
            own, other = int(given.labels[i]), int(given.labels[mixed.partners[i]])
            expected -= (mixed.lam * math.log(p[own]) + (1 - mixed.lam) * math.log(p[other])) / 6
        assert 0 < mixed.lam < 1
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)

    def test_weights_of_both_halves_are_drawn(self):
        module = ready(Mixup(**SMALL))
        drawn = [
            mixup(torch.zeros(2, 1), torch.zeros(2, 1), module.stream("mixup", i), 1.0, larger_half=False).lam
            for i in range(40)
        ]
        assert min(drawn) < 0.5 < max(drawn)

    def test_without_mixing_it_is_cross_entropy(self):
        module, given = ready(Mixup(**SMALL, alpha=0.0)), batch()
        torch.testing.assert_close(
            module.training_step(given, 0), F.cross_entropy(module.network(given.images), given.labels)
        )


class TestTruncatedGCE:
    def test_the_loss_of_each_sample(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(6, C), torch.arange(6) % C
        kept = torch.tensor([True, False, True, True, False, True])
        found = truncated_generalized_cross_entropy(logits, F.one_hot(labels, C).float(), 0.7, 0.5, kept)
        for value, row, y, k in zip(found, logits.tolist(), labels.tolist(), kept.tolist(), strict=True):
            expected = (1 - softmax(row)[y] ** 0.7) / 0.7 - (1 - 0.5**0.7) / 0.7
            assert float(value) == pytest.approx(expected if k else 0.0, abs=1e-5)

    def test_a_sample_at_the_threshold_has_no_loss_whether_kept_or_not(self):
        logits = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0]])  # p = 1/2
        for kept in (True, False):
            loss = truncated_generalized_cross_entropy(logits, torch.eye(C)[:1], 0.7, 0.5, torch.tensor([kept]))
            assert float(loss[0]) == pytest.approx(0.0, abs=1e-6)

    def test_samples_above_the_threshold_are_chosen_every_few_epochs(self):
        torch.manual_seed(0)
        module = ready(GCE(**SMALL, truncation=0.25, prune_every=2, warmup_epochs=1))
        probability = torch.exp(-module.predict_train("loss")["loss"])
        for epoch, chosen in ((0, False), (1, True), (2, False), (3, True)):
            module.selection.reset(N)
            module.trainer.fit_loop.epoch_progress.current.completed = epoch
            module.begin_epoch()
            expected = probability > 0.25 if chosen else torch.ones(N, dtype=torch.bool)
            assert torch.equal(module.selection.selected, expected)
        assert 0 < int((probability > 0.25).sum()) < N

    def test_the_stages_are_plain_and_truncated(self):
        given = batch()
        for epoch in (0, 1):
            torch.manual_seed(0)
            module = ready(GCE(**SMALL, truncation=0.5, warmup_epochs=1), epoch)
            module.selection.selected = torch.arange(N) % 2 == 0
            losses = generalized_cross_entropy(module.network(given.images), F.one_hot(given.labels, C).float(), 0.7)
            kept = (given.index % 2 == 0).float()
            expected = losses.mean() if epoch == 0 else (kept * (losses - (1 - 0.5**0.7) / 0.7)).mean()
            torch.testing.assert_close(module.training_step(given, 0), expected)

    def test_without_truncation_no_index_is_required(self):
        ready(GCE(**SMALL)).training_step(batch()._replace(index=None), 0)
        with pytest.raises(ValueError, match="expected batches with an index for GCE"):
            ready(GCE(**SMALL, truncation=0.5, warmup_epochs=0)).training_step(batch()._replace(index=None), 0)


class TestCorrection:
    def test_forward_is_the_cross_entropy_of_the_noisy_prediction(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(6, C), torch.arange(6) % C
        found = forward_correction(logits, F.one_hot(labels, C).float(), T)
        for value, row, y in zip(found, logits.tolist(), labels.tolist(), strict=True):
            p = softmax(row)
            assert float(value) == pytest.approx(-math.log(sum(p[i] * float(T[i, y]) for i in range(C))), rel=1e-4)

    def test_the_expected_backward_loss_over_noisy_labels_is_that_of_the_true_label(self):
        torch.manual_seed(0)
        logits = torch.randn(1, C).expand(C, C)
        losses = backward_correction(logits, torch.eye(C), T)  # of each noisy label
        torch.testing.assert_close(T @ losses, -logits[0].log_softmax(0))

    @pytest.mark.parametrize("corrected", [forward_correction, backward_correction])
    def test_with_the_identity_both_are_cross_entropy(self, corrected):
        logits, labels = torch.randn(6, C), torch.arange(6) % C
        found = corrected(logits, F.one_hot(labels, C).float(), torch.eye(C))
        torch.testing.assert_close(found, F.cross_entropy(logits, labels, reduction="none"))

    def test_forward_is_finite_with_finite_gradients_for_extreme_logits(self):
        logits = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
        loss = forward_correction(logits, torch.eye(C)[1:2], torch.eye(C)).sum()
        loss.backward()
        assert math.isfinite(float(loss.detach()))
        assert bool(torch.isfinite(logits.grad).all())

    def test_the_posterior_is_that_of_bayes(self):
        torch.manual_seed(0)
        logits, labels = torch.randn(6, C), torch.arange(6) % C
        found = label_posterior(logits, F.one_hot(labels, C).float(), T)
        for value, row, y in zip(found, logits.tolist(), labels.tolist(), strict=True):
            p = softmax(row)
            expected = p[y] * float(T[y, y]) / sum(p[i] * float(T[i, y]) for i in range(C))
            assert float(value) == pytest.approx(expected, rel=1e-4)

    def test_rows_are_the_predictions_for_the_anchors(self):
        probs = torch.rand(200, C, generator=torch.Generator().manual_seed(0)).softmax(1)
        found = estimate_transition(probs, None)
        for c in range(C):
            anchor = max(range(200), key=lambda i, c=c: float(probs[i, c]))
            torch.testing.assert_close(found[c], probs[anchor])
        robust = estimate_transition(probs, 97.0)
        for c in range(C):
            bound = sorted(probs[:, c].tolist())[math.ceil(0.97 * 199)]
            anchor = max((i for i in range(200) if float(probs[i, c]) < bound), key=lambda i, c=c: float(probs[i, c]))
            torch.testing.assert_close(robust[c], probs[anchor])

    def test_a_matrix_is_recovered_from_exact_posteriors(self):
        classes = torch.arange(400) % C
        torch.testing.assert_close(estimate_transition(T[classes], None), T)

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_the_stages_are_cross_entropy_and_the_corrected_loss(self, direction):
        corrected, given = {"forward": forward_correction, "backward": backward_correction}[direction], batch()
        for epoch in (0, 1):
            torch.manual_seed(0)
            module = ready(ForwardCorrection(**SMALL, direction=direction, warmup_epochs=1), epoch)
            module.transition = T
            logits = module.network(given.images)
            losses = corrected(logits, F.one_hot(given.labels, C).float(), T)
            expected = F.cross_entropy(logits, given.labels) if epoch == 0 else losses.mean()
            torch.testing.assert_close(module.training_step(given, 0), expected)

    def test_the_matrix_is_that_of_the_first_network(self):
        module = ready(ForwardCorrection(**SMALL, warmup_epochs=1, percentile=None), 1)
        expected = estimate_transition(module.predict_train("logits")["logits"].softmax(1), None)
        module.begin_stage()
        torch.testing.assert_close(module.transition, expected)
        assert module.stage.reset == "network"

    def test_masks_follow_the_posterior_of_the_last_visit(self):
        torch.manual_seed(0)
        module = ready(ForwardCorrection(**SMALL, transition=T.tolist(), sanm=SANM(mu=0.5, seed=0), warmup_epochs=0), 1)
        seen, forward, given = [], module.sanm.forward, batch()
        module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
        posterior = label_posterior(module.network(given.images), F.one_hot(given.labels, C).float(), T)
        for _ in range(2):
            module.training_step(given, 0)
        assert bool((seen[0].ratio == 0).all())  # nothing is known before the first visit
        torch.testing.assert_close(seen[1].ratio, 0.5 * (1 - posterior.detach()), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("matrix", "sentence"),
        [
            ([[0.5, 0.5]] * 2, r"expected a transition matrix \(4, 4\), got shape \(2, 2\)"),
            ((2 * T).tolist(), "expected a transition matrix with rows of probabilities, got sums from 2 to 2"),
            ([[0.25] * 4] * 4, "expected an invertible transition matrix, got one of rank 1 for 4 classes"),
        ],
    )
    def test_a_matrix_that_is_none_is_refused(self, matrix, sentence):
        with pytest.raises(ValueError, match=sentence):
            ForwardCorrection(**SMALL, transition=matrix)


class TestActiveBias:
    def test_the_weights(self):
        variance, count = torch.tensor([0.04, 0.09, 0.2, 0.0]), torch.tensor([2, 5, 1, 7])
        raw = [math.sqrt(0.04 + 0.04**2 / 1) + 0.2, math.sqrt(0.09 + 0.09**2 / 4) + 0.2, 0.2, 0.2]
        expected = [value / (sum(raw) / 4) for value in raw]
        assert uncertainty_weights(variance, count, 0.2).tolist() == pytest.approx(expected)

    def test_equal_variances_give_equal_weights(self):
        weights = uncertainty_weights(torch.full((5,), 0.3), torch.full((5,), 4), 0.2)
        torch.testing.assert_close(weights, torch.ones(5))

    def test_a_step_weights_the_losses_by_earlier_visits_and_records_the_probability(self):
        torch.manual_seed(0)
        module, given = ready(ActiveBias(**SMALL, warmup_epochs=1), 1), batch()
        history = torch.rand(3, 6)
        for row in history:
            module.probability.update(given.index, row)
        loss = module.training_step(given, 0)
        found = predictions(module.network, given.images)
        raw = []
        for i in range(6):
            values = history[:, i].tolist()
            variance = sum((v - sum(values) / 3) ** 2 for v in values) / 3
            raw.append(math.sqrt(variance + variance**2 / 2) + 0.2)
        losses = [-math.log(p[int(y)]) for p, y in zip(found, given.labels, strict=True)]
        expected = sum(w * loss for w, loss in zip(raw, losses, strict=True)) / sum(raw)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        assert module.probability.count[given.index].tolist() == [4] * 6
        mean = (history.sum(0) + torch.tensor([p[int(y)] for p, y in zip(found, given.labels, strict=True)])) / 4
        torch.testing.assert_close(module.probability.average[given.index], mean)

    def test_the_first_stage_is_cross_entropy_and_records(self):
        torch.manual_seed(0)
        module, given = ready(ActiveBias(**SMALL, warmup_epochs=1)), batch()
        torch.manual_seed(0)
        plain = ready(CrossEntropy(**SMALL))
        torch.testing.assert_close(module.training_step(given, 0), plain.training_step(given, 0))
        assert int(module.probability.count.sum()) == 6


def test_the_divergence_from_a_prior_is_zero_at_the_prior_only():
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert float(prior_kl(prior.log().expand(3, C), prior)) == pytest.approx(0.0, abs=1e-6)
    expected = sum(p * math.log(p / 0.25) for p in prior.tolist())
    assert float(prior_kl(torch.zeros(3, C), prior)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mixup(**SMALL, alpha=-1.0), "expected alpha >= 0, got -1.0"),
        (lambda: GCE(**SMALL, truncation=1.0), r"expected truncation in \(0, 1\) or null, got 1.0"),
        (lambda: ActiveBias(**SMALL, smoothing=0.0), "expected smoothing > 0, got 0.0"),
        (
            lambda: ForwardCorrection(**SMALL, direction="both"),
            "expected direction 'forward' or 'backward', got 'both'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
