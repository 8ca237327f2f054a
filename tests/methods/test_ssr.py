"""SSR: vote, selection, relabelling, balanced draw and consistency against slow loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sanm_lightning import SANM
from sanm_lightning.functional import (
    balanced_votes,
    class_balanced_draw,
    clean_probability,
    feature_consistency,
    fit_mixture,
    knn_vote,
    members_by_class,
    mixture_posterior,
    relabel,
)
from sanm_lightning.methods import SSR
from tests.methods.toy import data, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(**options) -> SSR:
    torch.manual_seed(0)
    return SSR(**{**SMALL, "k": 5, **options})


@given(st.integers(2, 25), st.integers(1, 6), st.integers(1, 7), st.integers(0, 100))
@settings(max_examples=30)
def test_the_vote_against_a_loop_whatever_the_chunk(count, k, chunk, seed):
    k = min(k, count)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 3, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    shares = knn_vote(features, labels, k, 4, chunk)
    rows = features.double().tolist()
    cosine = [
        [sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) for y in rows] for x in rows
    ]
    for i in range(count):
        near = sorted(range(count), key=lambda j, i=i: -cosine[i][j])[:k]
        assert i in near, "a sample is its own neighbor"
        assert shares[i].tolist() == pytest.approx([sum(int(labels[j]) == c for j in near) / k for c in range(4)])


def test_more_neighbours_than_samples_are_refused():
    with pytest.raises(ValueError, match="k in 1 to 3, got 4"):
        knn_vote(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64), 4, 2)
    with pytest.raises(
        ValueError, match=r"at least k = 65 training samples, one per neighbor, got 64; lower k \(--model\.k\)"
    ):
        trainer(1).fit(method(k=65), data())


def test_votes_are_divided_by_how_often_a_class_is_voted_for():
    shares, labels = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0, 0, 1])
    weighed = balanced_votes(shares, labels)
    assert weighed[0].tolist() == pytest.approx([0.25, 0.75], rel=1e-4)
    assert weighed[1].tolist() == pytest.approx([1, 0])


def test_a_class_without_any_label_never_wins_by_division():
    assert bool(torch.isfinite(balanced_votes(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))).all())


def test_relabelling_follows_the_sure_predictions_only():
    labels, p = torch.tensor([0, 1, 2]), torch.tensor([[0.05, 0.95, 0], [0.9, 0.1, 0], [0.91, 0, 0.09]])
    assert relabel(labels, p, 0.9).tolist() == [1, 1, 0]
    assert relabel(labels, p, 1.0).tolist() == labels.tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 50))
def test_a_balanced_draw_takes_members_of_the_pool(labels, seed):
    pool = torch.arange(len(labels)) * 3 + 1
    groups = members_by_class(pool, torch.tensor(labels), 6)
    drawn = class_balanced_draw(*groups, 40, torch.Generator().manual_seed(seed))
    assert set(drawn.tolist()) <= set(pool.tolist())


def test_a_balanced_draw_takes_every_class_and_every_member_alike():
    labels = torch.tensor([0] * 90 + [1] * 9 + [3])
    groups = members_by_class(torch.arange(100), labels, 5)
    drawn = class_balanced_draw(*groups, 60000, torch.Generator().manual_seed(0))
    counts = labels[drawn].bincount(minlength=5).double() / 60000
    torch.testing.assert_close(counts, torch.tensor([1, 1, 0, 1, 0]).double() / 3, atol=0.02, rtol=0)
    members = drawn.bincount(minlength=100)[:90].double()
    assert members.min() > 0.6 * members.mean()
    assert members.max() < 1.4 * members.mean()


def test_consistency_is_the_negative_cosine_and_the_target_gets_no_gradient():
    one, other = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    loss = feature_consistency(one, other)
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    cosines = [sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y) for x, y in pairs]
    assert float(loss.detach()) == pytest.approx(-sum(cosines) / 3, rel=1e-5)
    loss.backward()
    assert one.grad is not None
    assert other.grad is None


def test_the_selection_is_what_the_formulas_say():
    module, source = method(theta_r=0.26, vote_quality="share"), data()
    found, begin_epoch = {}, module.begin_epoch

    def vote():
        with torch.no_grad():
            module.eval()
            batch = source.batch("train", torch.arange(64))
            maps = module.network.forward_features(batch.images)
            found["features"] = module.network.forward_head(maps, pre_logits=True)
            found["p"] = module.network.forward_head(maps).softmax(1)
            module.train()
        begin_epoch()

    module.begin_epoch = vote
    trainer(1, limit_train_batches=1).fit(module, source)
    labels = relabel(source.labels, found["p"], 0.26)
    assert int((labels != source.labels).sum()) > 0
    assert torch.equal(module.selection.labels, labels)
    votes = balanced_votes(knn_vote(found["features"], labels, 5, 4), labels)
    for i in range(64):
        assert bool(module.selection.selected[i]) == (float(votes[i, labels[i]]) >= float(votes[i].max()))
    torch.testing.assert_close(module.label_quality(), votes[torch.arange(64), source.labels])


def test_an_empty_selection_is_said_and_survived(monkeypatch):
    module = method()
    monkeypatch.setattr(
        "sanm_lightning.methods.ssr.balanced_votes",
        lambda shares, labels: torch.ones_like(shares).scatter(1, labels[:, None], 0.5),
    )
    with pytest.warns(UserWarning, match="expected a selection with samples in epoch 0 of SSR, got an empty one"):
        trainer(1).fit(module, data())
    assert bool(module.selection.selected.all())


@pytest.mark.parametrize("kind", ["mixture", "share"])
def test_sanm_takes_the_quality_of_the_votes_and_not_the_score(kind):
    module = method(sanm=SANM(seed=0), vote_quality=kind)
    seen = []
    forward = module.sanm.forward
    module.sanm.forward = lambda network, images, targets, quality, *rest: (
        seen.append(quality) or forward(network, images, targets, quality, *rest)
    )
    trainer(1).fit(module, data())
    known = set(module.selection.quality.tolist())
    assert all(set(quality.tolist()) <= known for quality in seen)
    assert any(bool((quality < 1).any()) for quality in seen)


def vote_only(module, monkeypatch, votes):
    """Fit for one step with given votes (64, 4), so that the selection is that of these votes."""
    monkeypatch.setattr("sanm_lightning.methods.ssr.balanced_votes", lambda shares, labels: votes)
    trainer(1, limit_train_batches=1).fit(module, data())
    return module.selection


@given(st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_the_mixture_is_the_one_over_the_shares_of_the_labels_learned(seed):
    votes = torch.rand(64, 4, generator=torch.Generator().manual_seed(seed))
    votes = votes / votes.sum(1, keepdim=True)
    given_labels = data()
    given_labels.setup("fit")
    with pytest.MonkeyPatch.context() as patch:
        found = vote_only(method(theta_r=0.26), patch, votes)
    share = votes.gather(1, found.labels[:, None])[:, 0]
    of_given = votes.gather(1, given_labels.labels[:, None])[:, 0]
    assert bool((found.labels != given_labels.labels).any())
    torch.testing.assert_close(found.quality, clean_probability(1 - share))
    torch.testing.assert_close(found.given_quality, mixture_posterior(fit_mixture(1 - share), 1 - of_given))


def test_the_mixture_trusts_labels_that_win_narrowly_and_the_share_does_not(monkeypatch):
    source = data()
    source.setup("fit")
    labels = source.labels
    wins = torch.arange(64) % 2 == 0
    share = torch.where(wins, 0.4, 0.1) + 0.02 * torch.rand(64, generator=torch.Generator().manual_seed(0))
    votes = ((1 - share) / 3)[:, None].repeat(1, 4).scatter(1, labels[:, None], share[:, None])
    by_share = vote_only(method(theta_r=1.0, vote_quality="share"), monkeypatch, votes).quality
    by_mixture = vote_only(method(theta_r=1.0), monkeypatch, votes).quality
    torch.testing.assert_close(by_share, share)
    assert float(by_mixture[wins].min()) > 0.99
    assert float(by_mixture[~wins].max()) < 0.01


def test_a_selection_of_another_version_is_refused_in_a_sentence():
    state = method().state_dict()
    del state["selection._extra_state"]["tables"]["given_quality"]
    with pytest.raises(
        ValueError, match=r"expected the weights of SSR .* expected the tables given_quality of LabelStore"
    ):
        method().load_state_dict(state)


def test_a_warm_up_is_cross_entropy_on_given_labels():
    module = method(warmup_epochs=5, lambda_fc=0.0)
    losses, expected, step = [], [], module.training_step

    def watched(batch, batch_idx):
        with torch.no_grad():
            expected.append(torch.nn.functional.cross_entropy(module.network(batch.images), batch.labels))
        losses.append(step(batch, batch_idx))
        return losses[-1]

    module.training_step = watched
    trainer(6, limit_train_batches=1, limit_val_batches=0).fit(module, data())
    torch.testing.assert_close(torch.stack(losses[:5]).detach(), torch.stack(expected[:5]))
    assert not torch.allclose(losses[5].detach(), expected[5])
    assert not hasattr(module, "projection")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta_s": 1.1}, r"theta_s in \[0, 1\]"),
        ({"theta_r": -0.1}, r"theta_r in \[0, 1\]"),
        ({"k": 0}, "k >= 1, got 0"),
        ({"lambda_fc": -1.0}, "lambda_fc >= 0"),
        ({"alpha": -1.0}, "alpha >= 0"),
        ({"vote_quality": "score"}, "vote_quality 'mixture' or 'share', got 'score'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
