"""The out-of-fold probe against scikit-learn, fold by fold; folds, standardized features and votes against loops."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sanm_lightning.functional.linear_probe import (
    WEIGHT_DECAYS,
    assign_folds,
    linear_probe,
    log_loss,
    neighbor_probs,
    standardize,
)


def blobs(n: int = 240, classes: int = 3, dims: int = 7, spread: float = 2.0, seed: int = 0):
    """Overlapping blobs with a correlated feature, standardized."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    features = draw.normal(size=(classes, dims))[labels] + spread * draw.normal(size=(n, dims))
    features[:, -1] = features[:, 0] + 0.1 * features[:, -1]
    return standardize(features.astype(np.float32), np.arange(n)), labels


def sklearn_probs(features, labels, folds, decay: float, num_classes: int, learn=None):
    """Fit scikit-learn to the other folds; each class has a weight vector, so two classes are doubled into softmax form."""
    learn = np.ones(len(labels), bool) if learn is None else learn
    found = np.zeros((len(labels), num_classes))
    for fold in range(int(folds.max()) + 1):
        train, test = (folds != fold) & learn, folds == fold
        known = np.unique(labels[train])
        # Two weight vectors w, -w have the penalty 2 wd |w|^2 and the logit 2 w x of sklearn's one: wd |v|^2 / 2.
        strength = (1 if len(known) > 2 else 2) / (2 * decay * int(train.sum()))
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
        found[np.ix_(test, known)] = model.fit(features[train], labels[train]).predict_proba(features[test])
    return found


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("classes", [2, 3])
    @pytest.mark.parametrize("decay", [1.0, 0.05])
    def test_probabilities_are_those_of_a_regression_on_the_other_folds(self, classes, decay):
        features, labels = blobs(classes=classes)
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        found = linear_probe(features, labels, folds, classes, weight_decays=[decay])
        assert found.weight_decay == decay
        assert found.probs.dtype == np.float32
        np.testing.assert_allclose(
            found.probs, sklearn_probs(features, labels, folds, decay, classes), rtol=0, atol=1e-3
        )

    def test_a_class_that_a_fold_holds_alone_is_unlikely_and_the_others_are_as_without_it(self):
        features, labels = blobs()
        labels[:2], folds = 3, assign_folds(labels, np.arange(len(labels)), 5, 0)
        folds[:2] = 4  # the regression for fold 4 has never seen class 3
        probs = linear_probe(features, labels, folds, 4, weight_decays=[0.5]).probs
        reference = sklearn_probs(features, labels, folds, 0.5, 4)
        np.testing.assert_allclose(probs[folds != 4], reference[folds != 4], rtol=0, atol=5e-3)
        assert probs[folds == 4, 3].max() < 0.02
        known = probs[folds == 4, :3] / probs[folds == 4, :3].sum(1, keepdims=True)
        np.testing.assert_allclose(known, reference[folds == 4, :3], rtol=0, atol=0.02)

    def test_rows_that_are_not_learned_from_get_the_prediction_of_the_others(self):
        features, labels = blobs()
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        learn = np.arange(len(labels)) % 3 > 0
        probs = linear_probe(features, labels, folds, 3, learn, weight_decays=[0.2]).probs
        np.testing.assert_allclose(probs, sklearn_probs(features, labels, folds, 0.2, 3, learn), rtol=0, atol=1e-3)

    def test_a_search_on_a_part_of_the_set_goes_on_towards_weaker_decays_on_all_of_it(self):
        """Few samples require a strong decay, all of them a weaker one; losses and predictions are those of all."""
        features, labels = blobs(n=600, dims=40, spread=3.0)
        draw = np.random.default_rng(1)
        labels = np.where(draw.random(600) < 0.5, draw.integers(0, 3, 600), labels)
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        decays = [5.0, 2.0, 1.0, 0.5, 0.2, 0.05]
        part = np.sort(np.random.default_rng(4).permutation(len(labels))[:60])
        first = linear_probe(features[part], labels[part], folds[part], 3, weight_decays=decays)
        found = linear_probe(features, labels, folds, 3, weight_decays=decays, selection_size=60, seed=4)
        assert found.weight_decay < first.weight_decay
        assert list(found.log_losses) == decays[decays.index(first.weight_decay) :][: len(found.log_losses)]
        assert found.weight_decay == min(found.log_losses, key=found.log_losses.get)
        for decay, loss in found.log_losses.items():
            alone = sklearn_probs(features, labels, folds, decay, 3)
            assert loss == pytest.approx(log_loss(alone, labels), abs=2e-3)
        reference = sklearn_probs(features, labels, folds, found.weight_decay, 3)
        np.testing.assert_allclose(found.probs, reference, rtol=0, atol=3e-3)


class TestWhatIsLearnedFrom:
    def test_labels_of_other_rows_never_matter(self):
        features, labels = blobs()
        learn = np.arange(len(labels)) % 4 > 0
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        other = np.where(learn, labels, (labels + 1) % 3)
        one, two = (linear_probe(features, given, folds, 3, learn) for given in (labels, other))
        assert np.array_equal(one.probs, two.probs)
        assert one.log_losses == two.log_losses

    def test_a_label_never_matters_to_the_prediction_of_its_own_fold(self):
        features, labels = blobs()
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        other = np.where(folds == 2, (labels + 1) % 3, labels)
        one, two = (linear_probe(features, given, folds, 3, weight_decays=[0.5]).probs for given in (labels, other))
        np.testing.assert_allclose(one[folds == 2], two[folds == 2], rtol=0, atol=1e-3)
        assert np.abs(one[folds != 2] - two[folds != 2]).max() > 0.05

    def test_where_single_precision_finds_no_basis_double_does(self, monkeypatch):
        features, labels = blobs()
        folds, eigh = assign_folds(labels, np.arange(len(labels)), 5, 0), torch.linalg.eigh

        def single_fails(matrix):
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("The algorithm failed to converge")
            return eigh(matrix)

        one = linear_probe(features, labels, folds, 3, weight_decays=[0.5]).probs
        monkeypatch.setattr(torch.linalg, "eigh", single_fails)
        two = linear_probe(features, labels, folds, 3, weight_decays=[0.5]).probs
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-3)

    def test_few_rows_in_few_folds_serve_rows_of_all(self):
        features, labels = blobs(n=60)
        folds = np.where(np.arange(60) < 20, np.arange(60) % 2, np.arange(60) % 5)
        probs = linear_probe(features, labels, folds, 3, np.arange(60) < 20).probs
        assert probs.shape == (60, 3)
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)


class TestWeightDecay:
    @pytest.mark.parametrize(("spread", "dims"), [(0.3, 4), (3.0, 40)])
    def test_it_is_that_of_the_least_log_loss_out_of_fold(self, spread, dims):
        features, labels = blobs(n=120, dims=dims, spread=spread)
        folds = assign_folds(labels, np.arange(len(labels)), 5, 0)
        found = linear_probe(features, labels, folds, 3)
        losses = {d: log_loss(sklearn_probs(features, labels, folds, d, 3), labels) for d in WEIGHT_DECAYS}
        assert found.weight_decay == min(losses, key=lambda decay: losses[decay])
        for decay, loss in found.log_losses.items():
            assert loss == pytest.approx(losses[decay], abs=2e-3)
        assert log_loss(found.probs, labels) == pytest.approx(min(found.log_losses.values()), abs=1e-6)

    def test_the_search_ends_after_two_that_are_worse(self):
        draw = np.random.default_rng(0)
        features, labels = draw.normal(size=(80, 30)).astype(np.float32), draw.integers(0, 2, 80)
        folds = assign_folds(labels, np.arange(80), 5, 0)
        found = linear_probe(features, labels, folds, 2)  # noise: the strongest is the best
        assert list(found.log_losses) == list(WEIGHT_DECAYS[:3])
        assert found.weight_decay == WEIGHT_DECAYS[0]

    def test_features_that_say_nothing_give_class_frequencies(self):
        labels = np.arange(50) % 5 // 4  # 40 of class 0, 10 of class 1
        folds = assign_folds(labels, np.arange(50), 5, 0)
        found = linear_probe(np.zeros((50, 3), np.float32), labels, folds, 2)  # all weight decays are equal
        np.testing.assert_allclose(found.probs, [[0.8, 0.2]] * 50, atol=1e-3)


class TestFolds:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_groups_stay_together_and_classes_are_shared_out_evenly(self, seed):
        draw = np.random.default_rng(seed)
        groups = draw.permutation(np.repeat(np.arange(100, 400, 3), 1 + draw.integers(0, 4, 100)))
        class_of = {group: int(draw.integers(0, 4)) for group in np.unique(groups)}
        labels = np.array([class_of[group] for group in groups])
        folds = assign_folds(labels, groups, 5, seed)
        assert set(folds.tolist()) == set(range(5))
        assert all(len(set(folds[groups == group])) == 1 for group in np.unique(groups))
        fold_of = dict(zip(groups.tolist(), folds.tolist(), strict=True))
        for c in range(4):
            sizes = np.bincount([fold_of[group] for group, label in class_of.items() if label == c], minlength=5)
            assert sizes.max() - sizes.min() <= 1
        sizes = np.bincount(list(fold_of.values()), minlength=5)
        assert sizes.max() - sizes.min() <= 1

    def test_the_seed_decides(self):
        labels = np.arange(60) % 3
        one, again, other = (assign_folds(labels, np.arange(60), 5, seed) for seed in (0, 0, 1))
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)

    def test_fewer_groups_than_folds(self):
        assert sorted(assign_folds(np.array([0, 1, 0]), np.array([7, 3, 5]), 5, 0)) == [0, 1, 2]


class TestStandardize:
    def test_mean_and_variance_are_those_of_the_rows(self):
        draw = np.random.default_rng(0)
        features = (draw.normal(size=(9000, 4)) * [1, 1e-3, 50, 1] + [0, 5, -1000, 0.1]).astype(np.float32)
        rows = np.arange(3, 9000, 2)
        exact = features.astype(np.float64)
        expected = (exact - exact[rows].mean(0)) / exact[rows].std(0)
        np.testing.assert_allclose(standardize(features, rows), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e-12])
    def test_a_constant_feature_becomes_zero(self, value):
        features = np.stack([np.full(5000, value), np.arange(5000)], 1).astype(np.float32)
        found = standardize(features, np.arange(5000))
        assert not found[:, 0].any()
        assert found[:, 1].std() == pytest.approx(1, abs=1e-4)


class TestVotes:
    def test_against_a_loop(self):
        draw = np.random.default_rng(0)
        neighbors, labels = draw.integers(-1, 12, (30, 6)), draw.integers(0, 4, 12)
        similarity = draw.random((30, 6)).astype(np.float32)
        found = neighbor_probs(neighbors, similarity, labels, 5, prior_weight=0.5)
        for i in range(30):
            votes = [0.5 * np.mean(labels == c) for c in range(5)]
            for j in range(6):
                if neighbors[i, j] >= 0:
                    votes[labels[neighbors[i, j]]] += similarity[i, j]
            np.testing.assert_allclose(found[i], np.array(votes) / sum(votes), rtol=1e-5)

    def test_without_neighbors_the_prior_is_all_that_is_known(self):
        nobody, prior = np.full((2, 3), -1), np.array([0.2, 0.3, 0.5])
        weights = np.ones((2, 3), np.float32)
        np.testing.assert_allclose(neighbor_probs(nobody, weights, np.array([0, 1]), 3, prior), [prior] * 2, rtol=1e-6)
        np.testing.assert_allclose(neighbor_probs(nobody, weights, np.array([0, 1]), 3), [[0.5, 0.5, 0]] * 2)
