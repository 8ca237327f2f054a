"""The noise model against its definitions in loops, in the limit, and on noise that was planted."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sanm_lightning.functional.linear_probe import assign_folds, linear_probe, standardize
from sanm_lightning.functional.noise_model import (
    anchor_transition,
    confident_joint,
    deconvolve,
    fit_noise_model,
    judge_labels,
    label_posterior,
    predicts_labels,
    smooth_transition,
    transition_of,
)


def some_probs(n: int = 60, classes: int = 4, seed: int = 0):
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), n)


class TestConfidentJoint:
    def slow(self, probs, labels):
        """Count by the definition: above the threshold of a class, the likeliest of several; then scale."""
        num_classes = probs.shape[1]
        thresholds = [np.mean([p[c] for p, y in zip(probs, labels, strict=True) if y == c]) for c in range(num_classes)]
        counts = np.zeros((num_classes, num_classes))
        for p, y in zip(probs, labels, strict=True):
            above = [c for c in range(num_classes) if p[c] >= thresholds[c]]
            if above:
                counts[y, max(above, key=lambda c: p[c])] += 1
        frequency = np.bincount(labels, minlength=num_classes) / len(labels)
        return counts / counts.sum(1, keepdims=True) * frequency[:, None]

    def test_against_a_loop(self):
        for seed in range(5):
            probs, labels = some_probs(seed=seed), np.random.default_rng(seed).integers(0, 4, 60)
            np.testing.assert_allclose(confident_joint(probs, labels), self.slow(probs, labels), rtol=1e-12)

    def test_a_class_of_which_half_is_counted_under_each_label_has_its_whole_frequency(self):
        """True class 0: half of the images are below its threshold; a fourth of either half has the label 1."""
        probs = np.repeat([[0.8, 0.2], [0.45, 0.55], [0.1, 0.9]], [40, 40, 80], axis=0)
        labels = np.repeat([0, 1, 0, 1, 1], [30, 10, 30, 10, 80])
        np.testing.assert_allclose(confident_joint(probs, labels), np.array([[60, 0], [20, 80]]) / 160)

    def test_it_sums_to_one_with_the_frequencies_of_the_given_labels_in_its_rows(self):
        probs, labels = (
            some_probs(classes=5),
            np.random.default_rng(0).integers(0, 3, 60),
        )  # two classes without samples
        joint = confident_joint(probs, labels)
        np.testing.assert_allclose(joint.sum(1), np.bincount(labels, minlength=5) / 60)
        assert not joint[3:].any()
        assert not joint[:, 3:].any()

    def test_a_class_without_a_confident_sample_keeps_its_labels(self):
        probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
        joint = confident_joint(probs, np.array([0, 0, 0, 1]))  # label 0: threshold 2/3; label 1: .8
        np.testing.assert_allclose(joint, [[0.5, 0.25], [0, 0.25]])


class TestAnchors:
    @pytest.mark.parametrize(("size", "chosen"), [(1, 1), (20, 8), (150, 60)])
    def test_are_the_images_of_the_highest_probability(self, size, chosen, monkeypatch):
        monkeypatch.setattr("sanm_lightning.functional.noise_model.smooth_transition", lambda counts: counts)
        draw = np.random.default_rng(0)
        labels = np.repeat([0, 1, 3], [size, 300, 40])
        probs = 0.8 * draw.dirichlet(np.ones(4), len(labels)) + 0.2 * np.eye(4)[labels]
        found = anchor_transition(probs, labels)
        order = sorted(range(len(labels)), key=lambda row: probs[row, 0], reverse=True)
        for given in range(4):
            assert found[0, given] == sum(labels[row] == given for row in order[:chosen])
        assert found.sum(1).tolist() == [chosen, 120, 1, 16]
        assert found[2].tolist() == [0, 0, 1, 0]  # a class without labels has no anchor points

    @pytest.mark.parametrize("unused", [1, 30])
    def test_classes_without_labels_do_not_change_the_estimates(self, unused):
        draw = np.random.default_rng(0)
        right = np.repeat(np.arange(5), 100)
        given = np.where(draw.random(500) < 0.1, draw.integers(0, 5, 500), right)
        probs = np.full((500, 5), 0.02) + 0.9 * np.eye(5)[right]
        more = np.concatenate([probs * (1 - 1e-4), np.full((500, unused), 1e-4 / unused)], 1)
        few, many = fit_noise_model(probs, given), fit_noise_model(more, given)
        np.testing.assert_allclose(many.transition[:5, :5], few.transition, atol=1e-3)
        assert many.noise_rate == pytest.approx(few.noise_rate, abs=1e-3)
        np.testing.assert_allclose(many.interval, few.interval, atol=2e-3)
        np.testing.assert_array_equal(anchor_transition(more, given)[5:], np.eye(5 + unused)[5:])

    @pytest.mark.parametrize("kind", ["constant", "one class", "contrary"])
    def test_without_a_prediction_no_label_is_wrong_and_the_interval_is_everything(self, kind):
        """Out-of-fold probabilities of few samples are contrary to their labels, which are rarer in the other folds."""
        labels = np.zeros(20, int) if kind == "one class" else np.arange(20) % 2
        probs = np.full((20, 2), 0.5) - (0.03 * np.eye(2)[labels] if kind == "contrary" else 0)
        probs /= probs.sum(1, keepdims=True)
        model = fit_noise_model(probs, labels)
        assert model.noise_rate == 0
        assert model.interval == (0, 1)
        np.testing.assert_array_equal(model.posterior, np.eye(2)[labels])

    @pytest.mark.parametrize("rate", [0.5, 0.8])
    def test_symmetric_noise_leaves_a_prediction(self, rate):
        features, right, draw = blobs()
        given = np.where(draw.random(len(right)) < rate, draw.integers(0, 4, len(right)), right)
        folds = assign_folds(given, np.arange(len(given)), 5, 0)
        assert predicts_labels(linear_probe(features, given, folds, 4).probs, given, errors=2)

    def test_an_interval_without_a_significant_prediction_is_everything(self):
        probs, labels = some_probs(400), np.random.default_rng(3).integers(0, 4, 400)
        assert not predicts_labels(probs, labels, errors=2)
        assert fit_noise_model(probs, labels).interval == (0, 1)

    def test_errors_of_the_probe_are_not_counted_as_noise(self):
        """Two classes that overlap: the confident joint counts the images in between, and anchor points do not."""
        draw = np.random.default_rng(0)
        right = draw.integers(0, 2, 4000)
        position = draw.normal(2 * right - 1.0, 0.8)
        given = np.where(draw.random(4000) < 0.1, 1 - right, right)
        true = 1 / (1 + np.exp(-2 * position / 0.8**2))
        noisy = 0.1 + 0.8 * true
        probs = np.stack([1 - noisy, noisy], 1)
        found, confused = anchor_transition(probs, given), transition_of(confident_joint(probs, given))
        np.testing.assert_allclose(found, [[0.9, 0.1], [0.1, 0.9]], atol=0.03)
        assert confused[0, 1] > found[0, 1] + 0.02
        assert confused[1, 0] > found[1, 0] + 0.02


class TestSmoothing:
    @staticmethod
    def slow(counts, strength):
        """The marginal likelihood of the labels one by one, as draws from an urn, with the mean of the prior."""
        classes = len(counts)
        rate = (counts.sum() - np.trace(counts) + 0.5) / (counts.sum() + 1)
        prior = np.full((classes, classes), rate / (classes - 1))
        np.fill_diagonal(prior, 1 - rate)
        total = 0.0
        for row, mean in zip(counts, prior, strict=True):
            urn = strength * mean
            for given, count in enumerate(row):
                for _ in range(int(count)):
                    total += np.log(urn[given] / urn.sum())
                    urn[given] += 1
        return total, (counts + strength * prior) / (counts.sum(1, keepdims=True) + strength)

    def test_against_an_urn(self):
        counts = np.array([[30.0, 4, 0], [2, 20, 9], [1, 0, 40]])
        tried = [self.slow(counts, strength) for strength in np.logspace(-1, 5, 61)]
        np.testing.assert_allclose(smooth_transition(counts), max(tried, key=lambda pair: pair[0])[1], rtol=1e-9)

    def test_rows_that_are_alike_become_equal(self):
        counts = np.array([[79.0, 11, 10], [9, 80, 11], [10, 9, 81]])
        found = smooth_transition(counts)
        np.testing.assert_allclose(np.diag(found), 240.5 / 301, atol=1e-3)
        np.testing.assert_allclose(found[~np.eye(3, dtype=bool)], 60.5 / 602, atol=1e-3)

    def test_rows_that_differ_stay_as_counted(self):
        counts = np.array([[600.0, 400, 0], [0, 1000, 0], [0, 0, 1000]])
        np.testing.assert_allclose(smooth_transition(counts), counts / 1000, atol=0.005)

    def test_every_class_has_a_row_above_zero(self):
        found = smooth_transition(np.array([[5.0, 0, 0], [0, 0, 0], [0, 0, 3]]))
        np.testing.assert_allclose(found.sum(1), 1)
        assert (found > 0).all()
        assert (found.argmax(1) == [0, 1, 2]).all()


class TestDeconvolve:
    def test_the_identity_changes_nothing_in_the_limit(self):
        probs = some_probs()
        np.testing.assert_allclose(deconvolve(probs, np.eye(4), 1), probs, rtol=1e-9)
        np.testing.assert_allclose(deconvolve(probs, np.eye(4)), probs, rtol=1e-9)

    def test_a_known_matrix_is_inverted_as_steps_grow(self):
        right = np.random.default_rng(1).dirichlet(np.full(4, 2.0), 30)
        transition = 0.5 * np.eye(4) + 0.3 * np.roll(np.eye(4), 1, axis=1) + 0.05
        errors = [
            np.abs(deconvolve(right @ transition, transition, steps) - right).max() for steps in (1, 10, 100, 3000)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4
        assert errors[1] > 0.01  # few steps are a compromise

    def test_rows_are_probabilities(self):
        transition = some_probs(4, seed=2)
        found = deconvolve(some_probs(), transition)
        assert (found >= 0).all()
        np.testing.assert_allclose(found.sum(1), 1)

    def test_every_step_raises_the_likelihood(self):
        probs, transition = some_probs(), some_probs(4, seed=2)
        fits = [(probs * np.log(deconvolve(probs, transition, steps) @ transition)).sum(1) for steps in range(6)]
        assert all((after >= before - 1e-12).all() for before, after in itertools.pairwise(fits))


class TestPosterior:
    def test_it_is_bayes_rule(self):
        probs, transition = some_probs(), 0.6 * np.eye(4) + 0.1
        labels = np.random.default_rng(0).integers(0, 4, 60)
        found = label_posterior(probs, labels, transition)
        prior = deconvolve(probs, transition)
        for i in range(60):
            joint = [prior[i, c] * transition[c, labels[i]] for c in range(4)]
            np.testing.assert_allclose(found[i], np.array(joint) / sum(joint), rtol=1e-5)

    def test_without_noise_the_label_is_certain(self):
        labels = np.arange(60) % 4
        found = label_posterior(some_probs() * 0.9 + 0.025, labels, np.eye(4))
        np.testing.assert_allclose(found, np.eye(4)[labels])

    def test_a_label_that_says_nothing_changes_nothing(self):
        found = label_posterior(some_probs(), np.zeros(60, int), np.full((4, 4), 0.25))
        np.testing.assert_allclose(found, 0.25, rtol=1e-6)


def test_the_transition_matrix_is_the_joint_by_right_label():
    joint = np.array([[0.3, 0.1, 0.0], [0.2, 0.4, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(transition_of(joint), [[0.6, 0.4, 0], [0.2, 0.8, 0], [0, 0, 1]])


def blobs(n: int = 1200, classes: int = 4, seed: int = 0):
    draw = np.random.default_rng(seed)
    right = draw.integers(0, classes, n)
    features = 6 * np.eye(classes, 8)[right] + draw.normal(size=(n, 8))
    return standardize(features.astype(np.float32), np.arange(n)), right, draw


def fitted(features, labels, classes: int):
    folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
    return fit_noise_model(linear_probe(features, labels, folds, classes).probs, labels)


class TestPlantedNoise:
    @pytest.mark.parametrize("kind", ["symmetric", "class-dependent"])
    def test_rate_matrix_and_wrong_labels_are_found(self, kind):
        features, right, draw = blobs()
        planted = np.full((4, 4), 0.1) + 0.6 * np.eye(4)
        if kind == "class-dependent":
            planted = 0.6 * np.eye(4) + 0.4 * np.roll(np.eye(4), 1, axis=1)
        given = np.array([draw.choice(4, p=planted[c]) for c in right])
        model = fitted(features, given, 4)
        wrong = given != right
        assert model.interval[0] <= wrong.mean() <= model.interval[1]
        assert model.noise_rate == pytest.approx(wrong.mean(), abs=0.07)
        quality = model.posterior[np.arange(len(given)), given]
        assert roc_auc_score(wrong, -quality) > 0.99
        assert (model.posterior.argmax(1) == right).mean() > 0.95
        np.testing.assert_allclose(model.transition, planted, atol=0.12)
        exact = np.zeros((4, 4))
        np.add.at(exact, (given, right), 1 / len(given))
        np.testing.assert_allclose(model.joint, exact, atol=0.04)

    def test_noise_of_some_classes_only_is_ranked_right_and_inside_the_interval(self):
        """A limit: the estimate is low, because ten steps of the deconvolution do not sharpen it completely."""
        features, right, draw = blobs()
        planted = np.array([[0.6, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 0.75, 0.25], [0.1, 0, 0, 0.9]])
        given = np.array([draw.choice(4, p=planted[c]) for c in right])
        model = fitted(features, given, 4)
        wrong = given != right
        assert roc_auc_score(wrong, -model.posterior[np.arange(len(given)), given]) > 0.99
        assert 0.7 * wrong.mean() < model.noise_rate < wrong.mean()
        assert model.interval[0] <= wrong.mean() <= model.interval[1]

    def test_right_labels_that_are_all_predicted_have_an_estimate_of_zero(self):
        labels = np.random.default_rng(2).integers(0, 10, 300)  # the trace of the joint distribution is 1 + 2.2e-16
        probs = np.eye(10)[labels] * 0.9 + 0.01 + np.random.default_rng(2).uniform(0, 1e-3, (300, 10))
        assert np.trace(confident_joint(probs, labels)) > 1
        model = fit_noise_model(probs, labels)
        assert 0 <= model.noise_rate < 0.01
        assert 0 <= model.interval[0] <= model.interval[1] < 0.02

    def test_right_labels_are_believed(self):
        features, right, _ = blobs()
        model = fitted(features, right, 4)
        assert model.noise_rate < 0.01
        assert model.interval[0] == 0
        assert model.interval[1] < 0.02

    def test_classes_without_samples_stay_empty(self):
        features, right, draw = blobs()
        given = np.where(draw.random(len(right)) < 0.2, draw.integers(0, 4, len(right)), right)
        model = fitted(features, given, 6)
        assert np.isfinite(model.posterior).all()
        assert model.posterior[:, 4:].max() < 0.01
        np.testing.assert_allclose(model.transition.sum(1), 1)
        assert model.interval[0] <= (given != right).mean() <= model.interval[1]

    def test_the_low_end_is_estimated_on_a_subset_of_many_samples(self, monkeypatch):
        features, right, draw = blobs()
        given = np.where(draw.random(len(right)) < 0.2, draw.integers(0, 4, len(right)), right)
        whole = fitted(features, given, 4)
        monkeypatch.setattr("sanm_lightning.functional.noise_model.REFINED", 400)
        part = fitted(features, given, 4)
        assert part.interval[0] == pytest.approx(whole.interval[0], abs=0.05)
        assert part.interval[0] != whole.interval[0]
        assert part.noise_rate == whole.noise_rate

    def test_parts_belong_together(self):
        features, right, draw = blobs(n=300)
        given = np.where(draw.random(300) < 0.3, draw.integers(0, 4, 300), right)
        model = fitted(features, given, 4)
        np.testing.assert_allclose(model.posterior.sum(1), 1, rtol=1e-5)
        assert model.joint.sum() == pytest.approx(1)
        assert model.noise_rate == pytest.approx(1 - np.trace(model.joint), abs=1e-6)
        np.testing.assert_allclose(model.transition, transition_of(model.joint))
        for c in range(4):
            np.testing.assert_allclose(model.joint[c], model.posterior[given == c].sum(0) / 300, rtol=1e-4)
        assert model.interval[0] <= model.noise_rate <= model.interval[1]


class TestOtherSplits:
    """Labels of another split, judged by probabilities of the training labels."""

    @staticmethod
    def split(flipped: float, size: int = 3000, seed: int = 0):
        """Images whose class is certain, with a fraction of the labels moved to the next of three classes."""
        rng = np.random.default_rng(seed)
        true = rng.integers(0, 3, size)
        return true, np.where(rng.random(size) < flipped, (true + 1) % 3, true)

    def test_the_noise_of_each_split_is_its_own(self):
        transition = 0.6 * np.eye(3) + 0.4 * np.roll(np.eye(3), 1, 1)  # of the training labels: 40 % moved
        for flipped in (0.02, 0.4, 0.7):
            true, labels = self.split(flipped)
            posterior = judge_labels(transition[true], labels, transition)
            rate = 1 - posterior[np.arange(len(labels)), labels].mean()
            assert rate == pytest.approx((labels != true).mean(), abs=0.06), flipped
            assert (posterior.argmax(1) == true).mean() > 0.95

    def test_hard_images_with_right_labels_are_not_noise(self):
        transition = 0.6 * np.eye(3) + 0.4 * np.roll(np.eye(3), 1, 1)  # of the training labels: 40 % moved
        certain, labels = self.split(0.0)
        images = 0.8 * np.eye(3)[certain] + 0.2 * np.roll(np.eye(3), 1, 1)[certain]
        own, training = (judge(images @ transition, labels, transition)[np.arange(len(labels)), labels].mean()
                         for judge in (judge_labels, label_posterior))  # fmt: skip
        assert own > 0.99 > 0.98 > training

    def test_without_iterations_it_is_the_posterior_of_the_training_labels(self):
        transition = 0.7 * np.eye(3) + 0.3 * np.roll(np.eye(3), 1, 1)
        probs = np.random.default_rng(1).dirichlet(np.ones(3), 50)
        labels = np.random.default_rng(2).integers(0, 3, 50)
        np.testing.assert_allclose(
            judge_labels(probs, labels, transition, 0), label_posterior(probs, labels, transition), rtol=1e-5
        )
