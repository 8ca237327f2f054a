"""RRL, MOIT and Sel-CL against loops over samples, in their limits, and in every stage of a run."""

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.data import Noise, Toy
from sanm_lightning.methods import MOIT, RRL, SelCL
from sanm_lightning.methods.feature_queue import FeatureQueue
from tests.full import FULL
from tests.methods.recorded import LABELS
from tests.methods.reference import SMALL, C, N, batch, predictions, ready
from tests.methods.test_every_method import AtStep, watch
from tests.methods.toy import data, same, trainer

FEW = {"k": 5, "projection": 8}


def two_views(count: int = 2):
    """Six samples with different views."""
    given = batch()
    others = ((given.images * (1 - 0.2 * number)).flip(-number) for number in range(1, count))
    return given._replace(views=(given.images, *others))


def at(module, epoch: int = 0):
    torch.manual_seed(3)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return ready(module, epoch)


def embedding(module, images: Tensor) -> Tensor:
    """Normalized embeddings, one image at a time."""
    rows = []
    with torch.no_grad():
        for image in images:
            features = module.network.forward_head(module.network.forward_features(image[None]), pre_logits=True)[0]
            row = module.projection.weight @ features + module.projection.bias
            rows.append(row / row.square().sum().sqrt())
    return torch.stack(rows)


def cross_entropy(module, images: Tensor, labels) -> float:
    found = predictions(module.network, images)
    return sum(-math.log(p[int(y)]) for p, y in zip(found, labels, strict=True)) / len(found)


def prototype_contrast(module, images: Tensor, labels) -> list[float]:
    values = []
    for row, y in zip(embedding(module, images), labels, strict=True):
        logits = [float(row @ prototype) / module.temperature for prototype in module.prototypes]
        values.append(-logits[int(y)] + math.log(sum(math.exp(v) for v in logits)))
    return values


class TestRRL:
    def test_without_neighbors_and_reconstruction_it_is_prototype_contrast_on_given_labels(self):
        module = at(
            RRL(**SMALL, k=0, warmup_epochs=0, w_reconstruction=0.0, w_instance=0.0, w_prototype=2.0, alpha=0.0), 1
        )
        assert [stage.name for stage in module.stages()] == ["warmup", "given"]
        module.begin_epoch()
        found = embedding(module, module.trainer.datamodule.pass_batch(torch.arange(N), "train").images)
        for c in range(C):
            mean = torch.stack([found[i] for i in range(N) if LABELS[i] == c]).mean(0)
            torch.testing.assert_close(module.prototypes[c], mean / mean.norm(), rtol=1e-4, atol=1e-5)
        given = two_views()
        loss = float(module.training_step(given, 0).detach())
        contrast = [value for view in given.views for value in prototype_contrast(module, view, given.labels)]
        expected = cross_entropy(module, given.images, given.labels) + 2 * sum(contrast) / len(contrast)
        assert loss == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("confident", [[True, False, True, True, False, True], [False] * 6])
    def test_a_step_of_the_last_stage_uses_confident_samples_with_their_current_labels(self, confident):
        module = at(RRL(**SMALL, **FEW, warmup_epochs=0, given_epochs=1, alpha=0.0, w_instance=0.5, w_prototype=2.0), 1)
        module.prototypes = F.normalize(torch.randn(C, 8), dim=1)
        given = two_views()
        module.corrected.labels[:] = (torch.arange(N) + 1) % C
        module.corrected.selected[given.index] = torch.tensor(confident)
        loss = float(module.training_step(given, 0).detach())
        labels, used = (given.labels + 1) % C, [i for i in range(6) if confident[i]]
        expected = 0.0
        if used:
            expected += cross_entropy(module, given.images[used], labels[used])
            contrast = [v for view in given.views for v in prototype_contrast(module, view[used], labels[used])]
            expected += 2 * sum(contrast) / len(contrast)
        one, other = (embedding(module, view) for view in given.views)
        for i in range(6):
            pairs = [float(one[i] @ other[j]) for j in range(6)] + [float(one[i] @ one[j]) for j in range(6) if j != i]
            pairs = [s / module.temperature for s in pairs]
            expected += 0.5 * (-pairs[i] + math.log(sum(math.exp(s) for s in pairs))) / 6
        with torch.no_grad():
            for view in given.views:
                h = module.network.forward_head(module.network.forward_features(view), pre_logits=True)
                again = (h @ module.projection.weight.T + module.projection.bias) @ module.expansion.weight.T
                expected += float(((again + module.expansion.bias).clamp(min=0) - h).square().mean())
        assert loss == pytest.approx(expected, rel=1e-4)

    def test_labels_are_smoothed_over_neighbors(self):
        module = at(RRL(**SMALL, **FEW, warmup_epochs=1, given_epochs=0, low_threshold=0.3, high_threshold=0.6), 1)
        torch.manual_seed(0)
        embeddings, given = F.normalize(torch.randn(N, 8), dim=1), torch.arange(N) % C
        soft = None
        for epoch in (1, 2):
            probs = (2 * torch.randn(N, C)).softmax(1)
            module.trainer.fit_loop.epoch_progress.current.completed = epoch
            module.correct(torch.arange(N), embeddings, probs, given)
            before = probs if soft is None else soft
            if soft is None:
                before = torch.stack(
                    [F.one_hot(y, C).float() if p[y] > 0.3 else p for p, y in zip(probs, given, strict=True)]
                )
            soft, smoothed = [], []
            for i in range(N):
                near = sorted((j for j in range(N) if j != i), key=lambda j: -float(embeddings[i] @ embeddings[j]))[:5]
                w = [math.exp(float(embeddings[i] @ embeddings[j]) / 0.3) for j in near]
                q = sum(a * before[j] for a, j in zip(w, near, strict=True)) / sum(w)
                smoothed.append((q + probs[i]) / 2)
                y = given[i]
                soft.append(F.one_hot(y, C).float() if smoothed[-1][y] > 0.3 else smoothed[-1])
            soft = torch.stack(soft)
            store = module.corrected
            torch.testing.assert_close(store.targets, soft, rtol=1e-4, atol=1e-5)
            assert store.labels.tolist() == [int(q.argmax()) for q in soft]
            assert store.selected.tolist() == [float(q.max()) > 0.6 for q in soft]
            assert 0 < int(store.selected.sum()) < N
            for i in range(N):
                assert float(module.label_quality()[i]) == pytest.approx(float(smoothed[i][given[i]]), rel=1e-4)
                assert float(store.quality[i]) == pytest.approx(float(smoothed[i][store.labels[i]]), rel=1e-4)

    def test_a_new_pool_starts_from_the_predictions(self):
        module = at(RRL(**SMALL, **FEW, warmup_epochs=0, given_epochs=0, low_threshold=1.0), 3)
        index, probs = torch.arange(0, N, 2), (2 * torch.randn(N // 2, C)).softmax(1)
        embeddings = F.normalize(torch.randn(N // 2, 8), dim=1)
        module.correct(index, embeddings, probs, torch.zeros(N // 2, dtype=torch.int64))
        first = module.corrected.targets.clone()
        module.correct(index, embeddings, probs, torch.zeros(N // 2, dtype=torch.int64))
        assert torch.equal(module.corrected.targets, first)
        assert torch.equal(first[1::2], F.one_hot(torch.arange(N) % C, C).float()[1::2])

    @pytest.mark.parametrize(("epoch", "weight"), [(1, 1.0), (3, 3.0), (9, 5.0)])
    def test_the_weight_of_the_prototypes_grows_from_one(self, epoch, weight):
        options = {"w_reconstruction": 0.0, "w_instance": 0.0, "alpha": 0.0, "mix_views": 1}
        module = at(RRL(**SMALL, k=0, projection=8, warmup_epochs=1, ramp_epochs=4, w_prototype=5.0, **options), epoch)
        module.prototypes = F.normalize(torch.randn(C, 8), dim=1)
        given = two_views()
        contrast = prototype_contrast(module, given.images, given.labels)
        expected = cross_entropy(module, given.images, given.labels) + weight * sum(contrast) / len(contrast)
        assert float(module.training_step(given, 0).detach()) == pytest.approx(expected, rel=1e-4)


def contrast(views: Tensor, others: Tensor, positives, temperature: float) -> float:
    """The mean over rows of the negative log-probability of positives, row by row; the first rows of others are the views."""
    total = 0.0
    for i, row in enumerate(views):
        logits = [float(row @ other) / temperature for other in others]
        norm = math.log(sum(math.exp(v) for j, v in enumerate(logits) if j != i))
        found = [logits[j] - norm for j in positives(i) if j != i]
        total -= sum(found) / len(found) / len(views) if found else 0.0
    return total


class TestMOIT:
    def test_without_memory_and_mixing_it_is_supervised_contrast_of_the_batch_and_cross_entropy(self):
        module = at(MOIT(**SMALL, **FEW, alpha=0.0, memory_per_class=0, warmup_epochs=1))
        assert not [name for name, _ in module.named_buffers() if "memory" in name]
        given = two_views()
        found = torch.cat([embedding(module, view) for view in given.views])
        labels = given.labels.tolist() * 2
        expected = contrast(found, found, lambda i: [j for j in range(12) if labels[j] == labels[i]], 0.1)
        expected += sum(cross_entropy(module, view, given.labels) for view in given.views) / 2
        assert float(module.training_step(given, 0).detach()) == pytest.approx(expected, rel=1e-4)

    def test_the_memory_is_contrasted_in_addition_to_the_batch_which_joins_it(self):
        module = at(MOIT(**SMALL, **FEW, alpha=0.0, memory_per_class=2, memory_after=0, warmup_epochs=1))
        old, old_labels = F.normalize(torch.randn(3, 8), dim=1), [0, 1, 2]
        module.memory.enqueue(old, labels=torch.tensor(old_labels))
        given = two_views()
        found, labels = torch.cat([embedding(module, view) for view in given.views]), given.labels.tolist() * 2
        columns, everything = [*labels, *old_labels], torch.cat([found, old])
        expected = contrast(found, found, lambda i: [j for j in range(12) if labels[j] == labels[i]], 0.1)
        expected += contrast(found, everything, lambda i: [j for j in range(15) if columns[j] == labels[i]], 0.1)
        expected += sum(cross_entropy(module, view, given.labels) for view in given.views) / 2
        assert float(module.training_step(given, 0).detach()) == pytest.approx(expected, rel=1e-4)
        assert module.memory.labels.tolist() == [*labels, *old_labels, 0]
        assert module.memory.valid.tolist() == [True] * 15 + [False]
        torch.testing.assert_close(module.memory.features[:12], found, rtol=1e-4, atol=1e-5)

    def test_samples_that_are_not_selected_learn_the_prediction_for_the_unaugmented_image(self):
        module = at(MOIT(**SMALL, **FEW, alpha=0.0, memory_per_class=0, warmup_epochs=0), 1)
        given = two_views(3)
        module.detected.selected[given.index[[1, 4]]] = False
        loss = float(module.training_step(given, 0).detach())
        module.detected.selected[:] = True
        plain = float(module.training_step(given, 0).detach())
        wanted = predictions(module.network, given.views[2])
        expected = 0.0
        for view in given.views[:2]:
            found = predictions(module.network, view)
            for i in (1, 4):
                pseudo = -sum(t * math.log(p) for t, p in zip(wanted[i], found[i], strict=True))
                expected += (pseudo + math.log(found[i][int(given.labels[i])])) / 12
        assert loss - plain == pytest.approx(expected, rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize(("epoch", "share"), [(2, 0.0), (3, 0.2)])
    def test_fine_tuning_learns_the_predicted_class_after_some_epochs(self, epoch, share):
        module = at(MOIT(**SMALL, **FEW, alpha=0.0, warmup_epochs=0, select_epochs=1, bootstrap_after=2), epoch)
        assert module.stage.reset == "head"
        given = two_views(len(module.views()))
        loss = float(module.training_step(given, 0).detach())
        expected = (1 - share) * cross_entropy(module, given.images, given.labels)
        if share:
            classes = [p.index(max(p)) for p in predictions(module.network, given.views[1])]
            expected += share * cross_entropy(module, given.images, classes)
        assert loss == pytest.approx(expected, rel=1e-4)

    def test_samples_are_selected_by_the_second_votes(self):
        module = at(MOIT(**SMALL, **FEW, warmup_epochs=0), 1)
        module.begin_epoch()
        found = embedding(module, module.trainer.datamodule.pass_batch(torch.arange(N), "train").images)
        near = [
            sorted((j for j in range(N) if j != i), key=lambda j: -float(found[i] @ found[j]))[:5] for i in range(N)
        ]

        def vote(labels, i):
            counts = [[labels[j] for j in near[i]].count(c) for c in range(C)]
            return counts.index(max(counts)), counts

        won = [vote(LABELS.tolist(), i)[0] for i in range(N)]
        share = [min(max(vote(won, i)[1][int(LABELS[i])] / 5, 0.01), 0.99) for i in range(N)]
        agreeing = [vote(won, i)[0] == int(LABELS[i]) for i in range(N)]
        quota = sorted(sum(agreeing[i] for i in range(N) if LABELS[i] == c) for c in range(C))[(C - 1) // 2]
        assert module.label_quality().tolist() == pytest.approx(share)
        for c in range(C):
            members = [i for i in range(N) if LABELS[i] == c]
            assert sum(bool(module.detected.selected[i]) for i in members) == min(quota, len(members))
            kept = [share[i] for i in members if module.detected.selected[i]]
            left = [share[i] for i in members if not module.detected.selected[i]]
            assert not kept or not left or min(kept) >= max(left)
        assert quota > 0


class TestSelCL:
    def pairs_of(self, module, rows: Tensor) -> list[list[bool]]:
        store, features = module.detected, module.embeddings.features

        def paired(a, b):
            near = float(features[a] @ features[b]) >= float(module.threshold)
            both = bool(store.selected[a] and store.selected[b])
            return a == b or (int(store.labels[a]) == int(store.labels[b]) and (near or both))

        return [[paired(a, b) for b in rows.tolist()] for a in rows.tolist()]

    def test_the_first_stage_is_contrast_with_a_queue_of_keys(self):
        module = at(SelCL(**SMALL, **FEW, negatives=30))
        for slow, fast in ((module.key_network, module.network), (module.key_projection, module.projection)):
            slow.module.load_state_dict(fast.state_dict())
        old = F.normalize(torch.randn(4, 8), dim=1)
        module.negatives.enqueue(old)
        given = two_views()
        one, other = (embedding(module, view) for view in given.views)
        expected = 0.0
        for i in range(6):
            pairs = [float(one[i] @ row) / 0.1 for row in (other[i], *old)]
            expected += (-pairs[0] + math.log(sum(math.exp(s) for s in pairs))) / 6
        assert float(module.training_step(given, 0).detach()) == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(module.negatives.features[:10], torch.cat([other, old]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("clip", [None, 1e9])
    def test_a_step_of_the_second_stage(self, clip):
        options = {"alpha": 0.0, "negatives": 5, "memory_per_class": 1, "memory_after": 0, "similarity_clip": clip}
        module = at(SelCL(**SMALL, **FEW, **options, w_similarity=0.3, warmup_epochs=0), 1)
        for slow, fast in ((module.key_network, module.network), (module.key_projection, module.projection)):
            slow.module.load_state_dict(fast.state_dict())
        torch.manual_seed(1)
        module.embeddings.features = F.normalize(torch.randn(N, 8), dim=1)
        module.detected.selected[:] = torch.rand(N) < 0.4
        module.detected.labels[:] = torch.arange(N) % C
        module.threshold = torch.tensor(0.3)
        every, drawn = two_views(), two_views()
        drawn = drawn._replace(index=drawn.index + 6, labels=(drawn.index + 6) % C)
        both = every._replace(
            images=every.images.repeat(2, 1, 1, 1), labels=torch.cat([every.labels, drawn.labels]),
            index=torch.cat([every.index, drawn.index]), views=tuple(view.repeat(2, 1, 1, 1) for view in every.views),
        )  # fmt: skip
        old = F.normalize(torch.randn(2, 8), dim=1)
        old_index, old_probs = torch.tensor([0, 5]), torch.randn(2, C).softmax(1)
        module.memory.enqueue(old, probs=old_probs, index=old_index)
        loss = float(module.training_step(both, 0).detach())

        views = [embedding(module, view) for view in every.views]
        found, probs = torch.cat(views), [p for view in every.views for p in predictions(module.network, view)]
        index = torch.cat([every.index, every.index, old_index])
        pairs = self.pairs_of(module, index)
        expected = sum(cross_entropy(module, view, drawn.labels) for view in drawn.views) / 2
        for columns, divisor in ((12, 12), (14, 12 + 8)):  # the queue has eight rows, of which two are filled
            others = torch.cat([found, old])[:columns]
            every_probs = [*probs, *old_probs.tolist()][:columns]
            partnered = [sum(pairs[i][:columns]) > 2 for i in range(12)]  # more than the two views of the sample itself
            for i in range(12):
                if partnered[i]:
                    positives = [j for j in range(columns) if pairs[i][j] and j != i]
                    logits = [float(found[i] @ other) / 0.1 for other in others]
                    norm = math.log(sum(math.exp(v) for j, v in enumerate(logits) if j != i))
                    expected -= sum(logits[j] - norm for j in positives) / len(positives) / 12
                for j in range(columns):
                    if i != j:
                        p = sum(a * b for a, b in zip(probs[i], every_probs[j], strict=True))
                        expected -= 0.3 * math.log((p if pairs[i][j] else 1 - p) + 1e-7) / (12 * divisor)
        assert any(partnered)
        assert not all(partnered)
        # without negatives in the queue, the contrast of samples without a partner is 0
        assert loss == pytest.approx(expected, rel=1e-4)
        assert module.memory.index.tolist() == (every.index.tolist() * 2)[:8]

    def test_the_key_encoder_is_a_moving_average_with_a_constant_rate(self):
        module = SelCL(**SMALL, **FEW, decay=0.9)
        before = module.key_projection.module.weight.clone()
        with torch.no_grad():
            module.projection.weight += 1
        module.key_projection.update(module.projection)
        torch.testing.assert_close(module.key_projection.module.weight, before + 0.1)


def test_the_queue_holds_the_newest_rows_and_goes_into_checkpoints():
    queue = FeatureQueue(5, 2, {"labels": ((), torch.int64)})
    assert not queue.valid.any()
    for number in (1, 2, 3):
        queue.enqueue(torch.full((2, 2), float(number)), labels=torch.tensor([10 * number, 10 * number + 1]))
    assert queue.labels.tolist() == [30, 31, 20, 21, 10]
    assert queue.features[:, 0].tolist() == [3.0, 3.0, 2.0, 2.0, 1.0]
    again = FeatureQueue(5, 2, {"labels": ((), torch.int64)})
    again.load_state_dict(queue.state_dict())
    assert same(again, queue)
    queue.enqueue(torch.ones(9, 2), labels=torch.arange(9))
    assert queue.labels.tolist() == [0, 1, 2, 3, 4]


VIEW = {} if FULL else {"view": "weak"}
MAKE = {
    "RRL": lambda **o: RRL(**o, **VIEW, warmup_epochs=1, given_epochs=1, k=500, high_threshold=0.3),
    "MOIT": lambda **o: MOIT(**o, **VIEW, warmup_epochs=1, select_epochs=1, memory_after=0, bootstrap_after=0, k=500),
    "SelCL": lambda **o: SelCL(**o, **VIEW, warmup_epochs=1, select_epochs=1, memory_after=0, bootstrap_after=0, k=500),
}


@pytest.mark.parametrize(("name", "under"), [(name, under) for name in MAKE for under in ("sanm", "alone")[: 1 + FULL]])
def test_three_epochs_on_ten_classes_of_forty_images_have_every_stage(name, under, tmp_path):
    def made():
        torch.manual_seed(0)
        return MAKE[name](**{**SMALL, "num_classes": 10}, sanm=SANM(mu=0.5, seed=0) if under == "sanm" else None)

    def fit(module, ckpt_path=None, **options):
        source = Toy(
            num_samples=400, num_classes=10, batch_size=16, seed=3, noise=Noise("symmetric", 0.5), track_test=False
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer(3, **options).fit(module, source, ckpt_path=ckpt_path)
        return [str(warning.message) for warning in told if "neighbors" in str(warning.message)]

    whole, path = made(), str(tmp_path / "last_stage.ckpt")
    views, stages = watch(whole), [stage.epochs for stage in whole.stages()]
    told = fit(whole, callbacks=[AtStep(60, path)] * FULL)
    assert stages == [1, 1, None]
    assert told == [f"expected more than k = 500 samples for the neighbors of {name}, got 400; k is 399"]
    masked = [part for part in views if part.box is not None]
    assert any(bool((part.ratio > 0.01).any()) for part in masked) == (under == "sanm")
    assert all(bool(torch.isfinite(value).all()) for value in whole.parameters())
    if FULL:  # the default suite resumes shorter runs, see test_every_method
        again = made()
        fit(again, path)
        assert same(whole.network, again.network)
        assert same(whole.projection, again.projection)


@pytest.mark.parametrize("make", [MOIT, SelCL])
def test_fine_tuning_uses_selected_samples_only_and_leaves_the_projection(make):
    module = make(**SMALL, **FEW, warmup_epochs=1, select_epochs=1, bootstrap_after=0, memory_per_class=2, view="weak")
    seen, before = [], {}

    def noting(given, number, step=module.training_step):
        if module.stage.name == "finetune":
            before.setdefault("projection", module.projection.weight.detach().clone())
            before.setdefault("selected", module.detected.selected.clone())
            seen.extend(given.index.tolist())
        return step(given, number)

    module.training_step = noting
    trainer(3).fit(module, data(track_test=False))
    chosen = before["selected"].nonzero()[:, 0].tolist()
    assert 0 < len(chosen) < 64
    assert set(seen) <= set(chosen)
    assert len(seen) == 64
    assert torch.equal(module.projection.weight, before["projection"])


class TestUnmasked:
    def test_embeddings_are_those_of_unmasked_images(self):
        found = []
        for sanm in (None, SANM(mu=0.9, seed=0)):
            module = at(MOIT(**SMALL, **FEW, memory_per_class=0, warmup_epochs=0, sanm=sanm), 1)
            for part, seed in ((module.network, 0), (module.projection, 1)):
                torch.manual_seed(seed)
                torch.nn.utils.vector_to_parameters(
                    torch.randn(sum(p.numel() for p in part.parameters())) / 3, part.parameters()
                )
            module.detected.quality[:] = 0.0
            given = two_views(3)
            _, views = module.classified_views(
                given, module.one_hot(given.labels), module.detected.quality[given.index]
            )
            found.append(views.embeddings)
        torch.testing.assert_close(*found)

    def test_without_masks_there_is_no_further_pass(self):
        module = at(MOIT(**SMALL, **FEW, memory_per_class=0, warmup_epochs=0), 1)
        passes = []
        forward = module.network.forward_features
        module.network.forward_features = lambda images: passes.append(len(images)) or forward(images)
        given = two_views(3)
        module.classified_views(given, module.one_hot(given.labels))
        assert passes == [6, 6]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: RRL(**SMALL, low_threshold=1.5), r"expected low_threshold in \[0, 1\], got 1.5"),
        (lambda: RRL(**SMALL, k=-1), "expected k >= 0, got -1"),
        (lambda: MOIT(**SMALL, k=0), "expected k >= 1, got 0"),
        (lambda: MOIT(**SMALL, select_epochs=0), "expected select_epochs >= 1 or null, got 0"),
        (lambda: SelCL(**SMALL, decay=1.0), r"expected decay in \[0, 1\), got 1.0"),
        (
            lambda: SelCL(**SMALL, similarity_clip=0.25, compile_network="aot_eager"),
            "expected compile_network false for the similarity_clip of SelCL, .*; omit compile_network",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("make", [RRL, MOIT, SelCL])
def test_batches_without_index_are_refused_before_the_first_update(make):
    module = at(make(**SMALL))
    with pytest.raises(ValueError, match="expected batches with an index for"):
        module.training_step(two_views()._replace(index=None), 0)
