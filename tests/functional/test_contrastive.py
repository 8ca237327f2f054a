"""Contrastive losses and pairs against loops over views written from the papers."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning.functional import (
    ContrastKeys,
    MixedViews,
    clipped_gradient_term,
    instance_contrast,
    interpolated_contrast,
    pair_similarity,
    pair_threshold,
    partnered_contrast,
    prototype_contrast,
    queue_contrast,
    selected_pairs,
    view_positives,
)

B, P, C, K, T = 5, 6, 4, 7, 0.3


@pytest.fixture
def rows():
    """Embeddings of two views and of a queue, in float64, and labels."""
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(2 * B + K, P, dtype=torch.float64), dim=1)
    return embeddings[: 2 * B], embeddings[2 * B :], torch.tensor([0, 1, 0, 2, 1]), torch.tensor([0, 1, 2, 3, 0, 1, 2])


def dot(one, other) -> float:
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def test_the_instance_contrast_finds_the_other_view_among_both_views_of_the_other_images(rows):
    one, other = rows[0][:B], rows[0][B:]
    for i, value in enumerate(instance_contrast(one, other, T)):
        pairs = [dot(one[i], other[j]) for j in range(B)] + [dot(one[i], one[j]) for j in range(B) if j != i]
        expected = -dot(one[i], other[i]) / T + math.log(sum(math.exp(s / T) for s in pairs))
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_the_queue_contrast_leaves_out_rows_that_are_not_filled(rows):
    one, other, queue = rows[0][:B], rows[0][B:], rows[1]
    valid = torch.tensor([True, False, True, True, False, False, True])
    for i, value in enumerate(queue_contrast(one, other, queue, valid, T)):
        pairs = [dot(one[i], other[i])] + [dot(one[i], queue[j]) for j in range(K) if valid[j]]
        assert float(value) == pytest.approx(-pairs[0] / T + math.log(sum(math.exp(s / T) for s in pairs)), rel=1e-5)
    assert float(queue_contrast(one, other, queue, torch.zeros(K, dtype=torch.bool), T).abs().max()) < 1e-6


PARTNERS = torch.tensor([3, 1, 0, 2, 4, 1, 0, 2, 4, 3])  # sample 1 of the first views is mixed with itself


@pytest.mark.parametrize("queued", [False, True])
def test_the_interpolated_contrast_averages_over_the_positives_of_both_parts(rows, queued):
    views, queue, labels, queue_labels = rows
    lam = torch.tensor([0.8] * B + [0.6] * B, dtype=torch.float64)
    valid = torch.tensor([True, True, False, True, True, True, False])
    near = (labels[:, None] == queue_labels) & valid
    major, minor = view_positives(labels[:, None] == labels, PARTNERS, near if queued else None)
    others = torch.cat([views, queue]) if queued else views
    used = torch.cat([torch.ones(2 * B, dtype=torch.bool), valid]) if queued else None
    columns = [(int(labels[j % B]), j % B) for j in range(2 * B)] + [(int(y), None) for y in queue_labels] * queued
    kept = [j for j in range(len(columns)) if used is None or bool(used[j])]
    for i, value in enumerate(interpolated_contrast(views, others, lam, major, minor, T, used)):
        total = sum(math.exp(dot(views[i], others[j]) / T) for j in kept if j != i)
        parts = []
        for sample, repeated in ((i % B, False), (int(PARTNERS[i]), True)):
            terms = []
            for j in kept:
                label, position = columns[j]
                if j != i and label == int(labels[sample]):
                    # the views of the image that is mixed in count twice, as in the authors' code
                    terms += [dot(views[i], others[j]) / T - math.log(total)] * (1 + (repeated and position == sample))
            parts.append(sum(terms) / len(terms))
        assert float(value) == pytest.approx(-float(lam[i]) * parts[0] - (1 - float(lam[i])) * parts[1], rel=1e-5)


def test_a_view_without_positives_has_loss_zero_and_a_finite_gradient(rows):
    views, none = rows[0].clone().requires_grad_(), torch.zeros(2 * B, 2 * B)
    loss = interpolated_contrast(views, views, torch.full((2 * B,), 0.7), none, none, T).sum()
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool(torch.isfinite(views.grad).all())


def test_the_similarity_is_the_cross_entropy_of_having_the_same_class():
    torch.manual_seed(0)
    probs, others = torch.randn(4, C).softmax(1), torch.randn(6, C).softmax(1)
    lam, valid = torch.tensor([0.8, 0.8, 0.6, 0.6]), torch.tensor([True, True, True, True, False, True])
    major, minor = torch.randint(2, (4, 6)).float(), torch.randint(3, (4, 6)).float()
    expected = 0.0
    for i in range(4):
        for j in range(6):
            if i == j or not valid[j]:
                continue
            same = dot(probs[i], others[j])
            for weight, target in ((float(lam[i]), major[i, j]), (1 - float(lam[i]), minor[i, j])):
                expected -= weight * (math.log(same + 1e-7) if target > 0 else math.log(1 - same + 1e-7)) / 24
    assert float(pair_similarity(probs, others, lam, major, minor, valid)) == pytest.approx(expected, rel=1e-5)


def test_the_similarity_of_certain_predictions_has_a_finite_gradient():
    logits = (40 * torch.eye(2)).requires_grad_()
    probs = logits.softmax(1)
    for pairs in (torch.zeros(2, 2), torch.ones(2, 2)):
        loss = pair_similarity(probs, probs, torch.ones(2), pairs, pairs)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(gradient).all())


def test_pairs_have_one_label_and_are_both_selected_or_similar():
    torch.manual_seed(0)
    labels, features = torch.randint(2, (8,)), F.normalize(torch.randn(8, 3), dim=1)
    selected, threshold = torch.rand(8) < 0.5, torch.tensor(0.4)
    rows, columns = torch.tensor([0, 3, 5]), torch.arange(8)
    tables = [(table[rows], table[columns]) for table in (labels, features, selected)]
    found = selected_pairs(*tables, threshold)
    for i, a in enumerate(rows.tolist()):
        for b in range(8):
            near = dot(features[a], features[b]) >= 0.4 or bool(selected[a] and selected[b])
            assert bool(found[i, b]) == (near and int(labels[a]) == int(labels[b]))


@pytest.mark.parametrize("quantile", [0.0, 0.25, 1.0])
def test_the_threshold_is_a_quantile_of_the_similarities_within_classes(quantile):
    torch.manual_seed(0)
    features, labels = F.normalize(torch.randn(12, 3), dim=1), torch.arange(12) % 3
    every = sorted(
        dot(features[i], features[j]) for i in range(12) for j in range(12) if i != j and labels[i] == labels[j]
    )
    found = float(pair_threshold(features, labels, 3, quantile, torch.Generator().manual_seed(0), draws=2000))
    below, above = (sum(s < found + d for s in every) / len(every) for d in (-1e-5, 1e-5))
    assert below - 0.03 <= quantile <= above + 0.03
    assert found <= every[-1] + 1e-6, "a sample was paired with itself"


def test_the_only_sample_of_a_class_is_paired_with_itself():
    found = pair_threshold(torch.eye(3), torch.arange(3), 3, 0.5, torch.Generator())
    assert float(found) == 1


@pytest.mark.parametrize(("max_norm", "expected"), [(0.5, 0.5), (100.0, 5.0)])
def test_the_gradient_of_one_term_is_clipped_and_the_others_are_not(max_norm, expected):
    one, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    loss = (3 * one[0] + 4 * one[1]) + 0 * other.sum()
    term = clipped_gradient_term(loss, [one, other], max_norm)
    assert float(term.detach()) == pytest.approx(float(loss.detach()))
    (term + 7 * other.sum()).backward()
    torch.testing.assert_close(one.grad, expected / 5 * torch.tensor([3.0, 4.0]))
    assert float(other.grad) == 7


def test_the_contrast_with_prototypes_is_a_mean_over_some_rows_and_0_over_none(rows):
    views, prototypes = rows[0], rows[1][:C]
    targets, among = torch.rand(2 * B, C, dtype=torch.float64), torch.arange(2 * B) % 3 == 0
    targets = targets / targets.sum(1, keepdim=True)
    losses = []
    for i in range(2 * B):
        logits = [dot(views[i], prototype) / T for prototype in prototypes]
        norm = math.log(sum(math.exp(value) for value in logits))
        losses.append(-sum(float(t) * (v - norm) for t, v in zip(targets[i], logits, strict=True)))
    expected = [losses[i] for i in range(2 * B) if i % 3 == 0]
    found = prototype_contrast(views, prototypes, targets, T, among)
    assert float(found) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert float(prototype_contrast(views, prototypes, targets, T, torch.zeros_like(among))) == 0


def test_samples_without_a_partner_have_no_contrast(rows):
    views, queue, labels, queue_labels = rows
    others, valid = (
        torch.cat([views, queue]),
        torch.tensor([True] * (2 * B) + [True, True, False, True, True, True, False]),
    )
    lam = torch.tensor([0.8] * B + [0.6] * B, dtype=torch.float64)
    queued = (labels[:, None] == queue_labels) & valid[2 * B :]
    near = view_positives(labels[:, None] == labels, PARTNERS, queued)
    compared = ContrastKeys(others, torch.zeros(len(others), C), *near, valid)
    loss, partnered = partnered_contrast(MixedViews(views, lam, PARTNERS), compared, T)
    alone = [i for i in range(B) if labels.tolist().count(int(labels[i])) == 1 and not queued[i].any()]
    assert [i for i in range(B) if not partnered[i]] == alone == [3]
    losses = interpolated_contrast(views, others, lam, *near, T, valid)
    expected = sum(float(losses[i]) for i in range(2 * B) if i % B not in alone) / (2 * B)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_term_without_a_norm_is_the_loss():
    loss = torch.ones((), requires_grad=True) * 3
    assert clipped_gradient_term(loss, [], None) is loss
