"""Neighbors, votes, means and quotas against loops over samples and classes."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning.functional import (
    class_means,
    class_quota,
    corrected_votes,
    keep_given,
    mixup_among,
    nearest_neighbors,
    neighbor_mean,
    similar_samples,
    smoothed_labels,
    voted_selection,
    weighted_neighbors,
)
from sanm_lightning.functional import neighbors as file

N, D, C, K = 30, 5, 3, 4


@pytest.fixture
def features():
    torch.manual_seed(0)
    rows = torch.randn(N, D)
    rows[7] = rows[3] = rows[20]  # duplicates: a sample itself is not the first of equal similarities
    return rows[torch.randperm(N)]


def test_neighbors_are_those_of_largest_cosine_and_never_the_sample_itself(features):
    found, similarity = similar_samples(features, K)
    unit = F.normalize(features, dim=1)
    for i in range(N):
        others = sorted(((float(unit[i] @ unit[j]), j) for j in range(N) if j != i), reverse=True)[:K]
        assert i not in found[i].tolist()
        assert similarity[i].tolist() == pytest.approx([value for value, _ in others], abs=1e-5)
        assert [float(unit[i] @ unit[j]) for j in found[i]] == pytest.approx(similarity[i].tolist(), abs=1e-5)


def test_the_chunks_do_not_change_the_neighbors_and_bound_the_similarities_held(features, monkeypatch):
    whole = similar_samples(features, K)
    held = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda rows, *a, **o: held.append(rows.numel()) or topk(rows, *a, **o))
    monkeypatch.setattr(file, "CHUNK_VALUES", 4 * N)
    parts = similar_samples(features, K)
    assert max(held) == 4 * N
    torch.testing.assert_close(parts[1], whole[1])
    assert torch.equal(parts[0], nearest_neighbors(features, K, chunk=4))
    assert torch.equal(similar_samples(features, K, first=7)[0], parts[0][:7])


@pytest.mark.parametrize("weighted", [False, True])
def test_values_are_averaged_over_neighbors(features, weighted, monkeypatch):
    found, similarity = similar_samples(features, K)
    values, weights = torch.rand(N, C), (similarity / 0.3).exp() if weighted else None
    monkeypatch.setattr(file, "CHUNK_VALUES", 7 * K * C)
    mean = neighbor_mean(values, found, weights)
    for i in range(N):
        w = weights[i].tolist() if weighted else [1.0] * K
        for c in range(C):
            expected = sum(a * float(values[j, c]) for a, j in zip(w, found[i].tolist(), strict=True)) / sum(w)
            assert float(mean[i, c]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [K, N - 1, 500])
def test_weights_of_neighbors_are_the_softmax_of_their_similarities(features, k):
    found, weights = weighted_neighbors(features, k, 0.3)
    unit = F.normalize(features, dim=1)
    for i in range(N):
        others = sorted((float(unit[i] @ unit[j]) for j in range(N) if j != i), reverse=True)[:k]
        powers = [math.exp(value / 0.3) for value in others]
        assert weights[i].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-4)
        assert [float(unit[i] @ unit[j]) for j in found[i]] == pytest.approx(others, abs=1e-5)
        assert i not in found[i].tolist()
    plain, none = weighted_neighbors(features, k)
    assert torch.equal(plain, found)
    assert none is None


@pytest.mark.parametrize(("rows", "k"), [(N, 0), (1, 5)])
def test_a_sample_without_neighbors_is_its_own_mean(features, rows, k):
    values = torch.rand(rows, C)
    assert torch.equal(neighbor_mean(values, *weighted_neighbors(features[:rows], k, 0.3)), values)


def test_without_neighbors_a_sample_keeps_its_own_values():
    values = torch.rand(4, C)
    assert torch.equal(neighbor_mean(values, torch.zeros(4, 0, dtype=torch.int64)), values)


def test_the_second_vote_is_on_the_labels_that_won_the_first(features):
    found, _ = similar_samples(features, K)
    labels = torch.arange(N) % C
    votes = corrected_votes(labels, found, C)
    won = []
    for i in range(N):
        counts = [[int(labels[j]) for j in found[i]].count(c) for c in range(C)]
        won.append(counts.index(max(counts)))
    for i in range(N):
        assert votes[i].tolist() == pytest.approx([[won[j] for j in found[i]].count(c) / K for c in range(C)])


@pytest.mark.parametrize("weighted", [True, False])
def test_a_label_is_judged_by_its_share_of_the_second_votes(features, weighted):
    labels = torch.arange(N) % C
    neighbors, weights = weighted_neighbors(features, K, 0.5 if weighted else None)
    share, selected = voted_selection(labels, neighbors, weights, C, 0.5)
    votes = corrected_votes(labels, neighbors, C, weights)
    won = [int(votes[i].argmax()) == int(labels[i]) for i in range(N)]
    for i in range(N):
        assert float(share[i]) == pytest.approx(min(0.99, max(0.01, float(votes[i, labels[i]]))))
    quota = sorted(sum(won[i] for i in range(N) if labels[i] == c) for c in range(C))[1]
    assert quota > 0
    for c in range(C):
        members = [i for i in range(N) if labels[i] == c]
        assert {i for i in members if selected[i]} == set(sorted(members, key=lambda i: -float(share[i]))[:quota])


def test_votes_of_features_that_are_not_a_number_count_for_no_label():
    weights = torch.full((4, 2), float("nan"))
    share, _ = voted_selection(torch.tensor([0, 0, 1, 1]), torch.tensor([[1, 2], [0, 2], [0, 3], [0, 1]]), weights, 2)
    assert share.tolist() == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("first", [True, False])
def test_soft_labels_are_smoothed_and_likely_given_labels_kept(features, first):
    torch.manual_seed(1)
    given, probs, before = torch.arange(N) % C, torch.randn(N, C).softmax(1), torch.randn(N, C).softmax(1)
    neighbors, weights = weighted_neighbors(features, K, 0.3)
    found = smoothed_labels(None if first else before, probs, given, neighbors, weights, 0.4, 0.6)
    start = [F.one_hot(y, C).float() if p[y] > 0.4 else p for p, y in zip(probs, given, strict=True)]
    held = start if first else list(before)
    for i in range(N):
        near = sum(w * held[j] for w, j in zip(weights[i], neighbors[i], strict=True))
        smoothed, y = (near + probs[i]) / 2, int(given[i])
        target = F.one_hot(given[i], C).float() if smoothed[y] > 0.4 else smoothed
        torch.testing.assert_close(found.targets[i], target)
        assert int(found.labels[i]) == int(target.argmax())
        assert bool(found.selected[i]) == (float(target.max()) > 0.6)
        assert float(found.quality[i]) == pytest.approx(float(smoothed[target.argmax()]), rel=1e-5)
        assert float(found.given_quality[i]) == pytest.approx(float(smoothed[y]), rel=1e-5)
    assert 0 < int(found.selected.sum()) < N


def test_means_of_classes_are_zero_without_samples():
    features, labels = torch.rand(6, 2), torch.tensor([0, 0, 2, 2, 2, 0])
    selected = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(class_means(features, labels, 4)[2], (features[2] + features[3] + features[4]) / 3)
    found = class_means(features, labels, 4, selected)
    torch.testing.assert_close(found[0], (features[0] + features[5]) / 2)
    assert torch.equal(found[[1, 3]], torch.zeros(2, 2))
    assert torch.equal(class_means(features, labels, 4, torch.zeros(6, dtype=torch.bool)), torch.zeros(4, 2))


@pytest.mark.parametrize("quantile", [0.5, 0.75, 0.0, 1.0])
def test_classes_have_equal_quotas_of_smallest_scores(quantile):
    torch.manual_seed(0)
    labels, scores, agreeing = torch.randint(5, (60,)), torch.rand(60), torch.rand(60) < 0.4
    labels[labels == 4] = 5  # class 4 has no samples and is not counted
    found = class_quota(scores, labels, agreeing, 6, quantile)
    counts = sorted(int((agreeing & (labels == c)).sum()) for c in (0, 1, 2, 3, 5))
    place = quantile * 4
    low, high = counts[math.floor(place)], counts[math.ceil(place)]
    quota = low if quantile == 0.5 else int(low + (place - math.floor(place)) * (high - low))
    for c in range(6):
        members = [i for i in range(60) if labels[i] == c]
        assert {i for i in members if found[i]} == set(sorted(members, key=lambda i: float(scores[i]))[:quota])


def test_nothing_is_selected_where_no_label_wins():
    assert not class_quota(torch.rand(9), torch.arange(9) % 3, torch.zeros(9, dtype=torch.bool), 3).any()


def test_rows_are_mixed_within_their_part_of_the_batch():
    torch.manual_seed(0)
    among = torch.rand(20) < 0.4
    images, targets = torch.rand(20, 1, 2, 2), torch.rand(20, C)
    mixed = mixup_among(images, targets, among, torch.Generator().manual_seed(0), 8.0)
    assert torch.equal(among[mixed.partners], among)
    assert sorted(mixed.partners.tolist()) == list(range(20))
    assert mixed.partners.tolist() != list(range(20))
    torch.testing.assert_close(mixed.images, mixed.mix(images))
    whole = mixup_among(images, targets, torch.zeros(20, dtype=torch.bool), torch.Generator().manual_seed(0), 0.0)
    assert torch.equal(whole.images, images)


def test_the_given_label_is_kept_above_the_threshold_only():
    targets = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    found = keep_given(targets, torch.tensor([0, 1]), 0.25)
    torch.testing.assert_close(found, torch.tensor([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]]))
