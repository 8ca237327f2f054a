"""INCV, after REED and after CREMA against loops over samples and in their limits."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.batch import EpochPlan
from sanm_lightning.callbacks import Stages
from sanm_lightning.functional import (
    clean_probability,
    cross_validated,
    cross_validated_noise_rate,
    discarded_fraction,
    held_out,
    remaining_noise_rate,
    sequence_credibility,
    step_fractions,
)
from sanm_lightning.methods import CREMA, INCV, REED, CrossEntropy
from tests.methods.recorded import LABELS
from tests.methods.reference import SMALL, C, N, batch, predictions, ready
from tests.methods.test_every_method import encoder  # noqa: F401
from tests.methods.toy import data, trainer


def plan(epoch: int, batch_size: int = 8) -> EpochPlan:
    return EpochPlan(epoch, 4, batch_size, N, 0, 1, lambda peer: torch.arange(N))


class TestNoiseRates:
    @pytest.mark.parametrize("accuracy", [1.0, 0.9, 0.5, 0.3, 0.101])
    def test_the_estimate_solves_the_equation_on_a_grid(self, accuracy):
        rate = 0.0
        while (1 - rate) ** 2 + rate**2 / 9 > accuracy:
            rate += 1e-4
        assert cross_validated_noise_rate(accuracy, 10) == pytest.approx(rate, abs=2e-4)

    def test_random_labels_are_the_largest_estimate(self):
        assert cross_validated_noise_rate(0.1, 10) == pytest.approx(0.9)
        assert cross_validated_noise_rate(0.02, 10) == pytest.approx(0.9)

    def test_the_rate_of_selected_samples_is_that_of_a_simulation(self):
        """A network with the transition matrix of the noise, whose prediction is the label."""
        generator = torch.Generator().manual_seed(0)
        for kinds in (3, 1):
            drawn = torch.rand(2, 200_000, generator=generator) < 0.4
            shift = torch.where(drawn, torch.randint(1, kinds + 1, drawn.shape, generator=generator), 0)
            agreed = shift[0] == shift[1]
            assert remaining_noise_rate(0.4, kinds) == pytest.approx(float(drawn[0][agreed].float().mean()), abs=5e-3)

    def test_discarded_are_at_most_twice_the_selected(self):
        assert [discarded_fraction(rate) for rate in (0.0, 0.5, 0.6, 0.9, 1.0)] == pytest.approx([0, 1, 1.5, 2, 2])

    def test_a_sample_is_held_out_from_the_network_of_the_other_half(self):
        values, half = torch.arange(8.0).view(2, 4), torch.tensor([0, 1, -1, 0])
        expected = [float(values[0 if side == 1 else 1, i]) for i, side in enumerate(half.tolist())]
        assert held_out(values, half).tolist() == expected == [4, 1, 6, 7]

    def test_a_candidate_agrees_with_the_network_that_was_not_trained_on_it(self):
        generator = torch.Generator().manual_seed(1)
        predictions, labels = (
            torch.randint(3, (2, 20), generator=generator),
            torch.randint(3, (20,), generator=generator),
        )
        losses, half = torch.rand(2, 20, generator=generator), torch.arange(20) % 3 - 1
        found = cross_validated(predictions, losses, labels, half)
        expected = [side >= 0 and bool(predictions[1 - side, i] == labels[i]) for i, side in enumerate(half.tolist())]
        assert found.agreed.tolist() == expected
        assert 0 < sum(expected) < 13
        assert found.accuracy == pytest.approx(sum(expected) / 13)
        for i, side in enumerate(half.tolist()):
            assert side < 0 or float(found.losses[i]) == float(losses[1 - side, i])
        assert cross_validated(predictions, losses, labels, torch.full((20,), -1)).accuracy == 0

    def test_a_rate_in_steps(self):
        factors = [step_fractions(step, 10, (0.4, 0.6, 0.8), (0.5, 0.25, 0.1)) for step in range(10)]
        assert factors == [1.0] * 4 + [0.5] * 2 + [0.25] * 2 + [0.1] * 2


class TestINCV:
    def scored(self, predicted: torch.Tensor, losses: torch.Tensor, **options) -> INCV:
        """A module before its main stage, with given predictions (2, N) and losses (2, N)."""
        module = ready(INCV(**SMALL, **{"rounds": 1, "warmup_epochs": 1, **options}), 1)
        found = {"predictions": predicted, "loss": losses, "labels": LABELS, "index": torch.arange(N)}
        module.predict_train = lambda *_, **__: found
        return module

    def test_selects_and_discards_by_the_network_that_was_not_trained_on_a_sample(self):
        generator = torch.Generator().manual_seed(0)
        predicted = torch.where(torch.rand(2, N, generator=generator) < 0.6, LABELS, (LABELS + 1) % C)
        losses = torch.rand(2, N, generator=generator)
        module = self.scored(predicted, losses)
        half = module.halves(0).tolist()
        assert [half.count(side) for side in (0, 1)] == [N // 2, N // 2]
        module.begin_stage()
        held_out = [float(losses[1 - side, i]) for i, side in enumerate(half)]
        agreed = [bool(predicted[1 - side, i] == LABELS[i]) for i, side in enumerate(half)]
        rate = cross_validated_noise_rate(sum(agreed) / N, C)
        assert module.selection.noise_rate == pytest.approx(rate)
        assert 0 < rate < 0.75
        expected = [1 if a else 0 for a in agreed]
        for side in (0, 1):
            members = [i for i in range(N) if half[i] == side]
            count = int(rate / (1 - rate) * sum(agreed[i] for i in members))
            for i in sorted(members, key=lambda i: -held_out[i])[:count]:
                expected[i] = expected[i] or 2
        assert module.selection.status.tolist() == expected
        assert {0, 1, 2} == set(expected)
        clean = clean_probability(torch.tensor(held_out))
        quality = [1.0 if status == 1 else float(clean[i]) for i, status in enumerate(expected)]
        assert module.label_quality().tolist() == pytest.approx(quality, abs=1e-5)

    def test_one_round_on_labels_that_are_all_predicted_keeps_everything(self):
        module = self.scored(LABELS.expand(2, N), torch.rand(2, N))
        module.begin_stage()
        assert module.selection.noise_rate == 0
        assert module.selection.status.tolist() == [1] * N
        assert module.epoch_batches(plan(1, N)).sort(1).values.tolist() == [list(range(N))] * 4

    def test_noise_between_pairs_discards_nothing_and_a_given_rate_is_kept(self):
        predicted = torch.where(torch.arange(N) < 20, LABELS, (LABELS + 1) % C).expand(2, N)
        module = self.scored(predicted, torch.rand(2, N), symmetric=False, noise_rate=0.3)
        module.begin_stage()
        assert module.selection.noise_rate == 0.3
        assert sorted(module.selection.status.tolist()) == [0] * 12 + [1] * 20

    def test_the_networks_of_a_round_are_trained_on_the_selected_and_on_one_half_each(self):
        module = ready(INCV(**SMALL, rounds=2, warmup_epochs=1), 1)
        module.selection.update(status=torch.where(torch.arange(N) < 8, 1, torch.where(torch.arange(N) < 12, 2, 0)))
        half, rows = module.halves(1), module.epoch_batches(plan(1, 8))
        assert rows.shape == (4, 16)
        for side, block in enumerate(rows.split(8, 1)):
            allowed = {i for i in range(N) if i < 8 or int(half[i]) == side}
            assert set(block.flatten().tolist()) == allowed
        assert sorted(half[half >= 0].tolist()) == [0] * 10 + [1] * 10

    def test_candidates_join_late_and_no_discarded_sample_ever(self):
        module = ready(INCV(**SMALL, rounds=1, warmup_epochs=1, candidates_after=1), 2)
        module.selection.update(status=torch.where(torch.arange(N) < 16, 1, torch.where(torch.arange(N) < 24, 0, 2)))
        early, late = module.epoch_batches(plan(2)), module.epoch_batches(plan(3))
        assert early.shape == (4, 8)
        assert late.shape == (4, 12)  # 8 candidates for 16 selected samples
        assert set(early.flatten().tolist()) == set(late[:, :8].flatten().tolist()) == set(range(16))
        assert set(late[:, 8:].flatten().tolist()) == set(range(16, 24))

    def test_a_step_of_the_main_stage_is_co_teaching_with_the_remaining_noise(self):
        module = ready(INCV(**SMALL, rounds=1, warmup_epochs=1, noise_rate=0.6, num_gradual=1), 3)
        module.selected_rows = 6
        given, total = batch(8), 0.0  # six selected samples and two candidates
        count = round(6 * (1 - 0.36 / (0.36 + 3 * 0.16)))
        assert count == 3
        found = [predictions(network, given.images) for network in module.networks]
        losses = [[-math.log(p[int(y)]) for p, y in zip(rows, given.labels, strict=True)] for rows in found]
        for number in (0, 1):
            chosen = sorted(range(8), key=losses[1 - number].__getitem__)[:count]
            total += sum(losses[number][i] for i in chosen) / count
        assert float(module.training_step(given, 0).detach()) == pytest.approx(total, rel=1e-4)

    def test_a_step_of_a_round_is_cross_entropy_of_each_network_on_its_block(self):
        module, given = ready(INCV(**SMALL, rounds=1, warmup_epochs=1)), batch(6)
        expected = [
            F.cross_entropy(network(given.images[rows]), given.labels[rows])
            for network, rows in zip(module.networks, (slice(3), slice(3, 6)), strict=True)
        ]
        torch.testing.assert_close(module.training_step(given, 0), sum(expected))

    @pytest.mark.parametrize(("rate", "symmetric", "epochs"), [(0.5, True, 40), (0.7, True, 80), (0.2, False, 80)])
    def test_candidates_join_after_the_published_fraction_of_the_main_stage(self, rate, symmetric, epochs):
        module = INCV(**SMALL, noise_rate=rate, symmetric=symmetric)
        assert ready(module, max_epochs=300).last_epoch_without_candidates == epochs
        assert ready(module, max_epochs=200).last_epoch_without_candidates == epochs // 2

    def test_an_empty_selection_is_said_and_all_samples_are_used(self):
        module = self.scored(((LABELS + 1) % C).expand(2, N), torch.rand(2, N))
        module.begin_stage()
        with pytest.warns(
            UserWarning, match=r"expected a selection with samples in epoch 1 of INCV, got an empty one; training on"
        ):
            rows = module.epoch_batches(plan(1))
        assert set(rows.flatten().tolist()) == set(range(N))


class TestREED:
    def made(self, epoch: int = 1, **options) -> REED:
        torch.manual_seed(0)
        return ready(REED(**SMALL, **{"warmup_epochs": 1, "pretrained": "FILE", **options}), epoch)

    def test_the_first_stage_trains_the_classifier_only(self, encoder):  # noqa: F811
        torch.manual_seed(0)
        module = REED(**SMALL, warmup_epochs=2, pretrained=encoder)
        seen = {}

        def watched(batch, batch_idx, step=module.training_step):
            seen[int(module.trainer.global_step)] = {k: v.clone() for k, v in module.network.state_dict().items()}
            return step(batch, batch_idx)

        module.training_step = watched
        trainer(3).fit(module, data())
        changed = {key for key in seen[0] if not torch.equal(seen[0][key], seen[7][key])}
        assert changed == {"network.fc.weight", "network.fc.bias"}
        assert {key for key in seen[0] if not torch.equal(seen[8][key], seen[10][key])} > changed

    def test_gradients_of_0_do_not_decay_the_encoder(self):
        module = self.made(0)
        for parameter in module.parameters():  # as with several processes
            parameter.grad = torch.zeros_like(parameter)
        Stages().on_before_optimizer_step(module.trainer, module, None)
        left = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert left == {"network.network.fc.weight", "network.network.fc.bias"}

    def test_a_step_of_the_classifier_is_cross_entropy(self):
        module, given = self.made(0), batch()
        plain = ready(CrossEntropy(**SMALL))
        plain.network.load_state_dict(module.network.state_dict())
        torch.testing.assert_close(module.training_step(given, 0), plain.training_step(given, 0))

    def test_the_division_is_the_mixture_of_the_losses_and_the_graph_the_nearest_other_samples(self):
        module = self.made(k=3)
        module.begin_stage()
        found = module.predict_train("loss", "features", "logits")
        quality = clean_probability(found["loss"])
        torch.testing.assert_close(module.label_quality(), quality)
        assert torch.equal(module.graph.selected, quality > 0.5)
        similar = F.cosine_similarity(found["features"][:, None], found["features"], dim=2).fill_diagonal_(-2)
        assert torch.equal(module.graph.neighbors.sort(1).values, similar.topk(3, dim=1).indices.sort(1).values)
        probs = found["logits"].softmax(1)
        torch.testing.assert_close(module.graph.neighbor_mean(torch.arange(N)), probs[module.graph.neighbors].mean(1))

    def test_more_neighbors_than_samples_are_all_others_and_said(self, monkeypatch):
        module, lines = self.made(k=40), []
        monkeypatch.setattr("sanm_lightning.methods.reed.rank_zero_info", lines.append)
        module.begin_stage()
        for i, near in enumerate(module.graph.neighbors.tolist()):
            assert sorted(near) == [-1] * 9 + [j for j in range(N) if j != i]
        assert lines == ["REED: each sample has 31 instead of k = 40 neighbors, all other samples"]
        others = [j for j in range(N) if j != 5]
        torch.testing.assert_close(module.graph.neighbor_mean(torch.tensor([5]))[0], module.graph.probs[others].mean(0))

    def test_a_step_is_mixmatch_and_the_graph(self):
        """Without mixing: the rows are the two views of every sample."""
        module = self.made(2, alpha=0.0, ramp_epochs=0.0, lambda_u=3.0, graph_weight=0.7, temperature=0.5, k=2)
        module.trainer.fit_loop.max_batches, given = 4, batch(4)
        views = (given.images, given.images.flip(3))
        given = given._replace(views=views)
        probs = torch.rand(N, C, generator=torch.Generator().manual_seed(1)).softmax(1)
        module.graph.update(neighbors=torch.stack([(torch.arange(N) + d) % N for d in (7, 9)], 1), probs=probs)
        found = [predictions(module.network, view) for view in views]
        total = 0.0
        for i in range(4):
            mean = [(a + b) / 2 for a, b in zip(found[0][i], found[1][i], strict=True)]
            sharp = [v**2 / sum(u**2 for u in mean) for v in mean]
            near = [
                (float(probs[int(given.index[i]) + 7, c]) + float(probs[int(given.index[i]) + 9, c])) / 2
                for c in range(C)
            ]
            for rows in found:
                if i < 2:
                    total -= math.log(rows[i][int(given.labels[i])]) / 4
                else:
                    total += 3.0 * sum((p - t) ** 2 for p, t in zip(rows[i], sharp, strict=True)) / C / 4
                total += 0.7 * sum((p - t) ** 2 for p, t in zip(rows[i], near, strict=True)) / C / 8
        assert float(module.training_step(given, 0).detach()) == pytest.approx(total, rel=1e-4)
        for i in range(4):
            mean = [(a + b) / 2 for a, b in zip(found[0][i], found[1][i], strict=True)]
            assert module.graph.probs[int(given.index[i])].tolist() == pytest.approx(mean, rel=1e-4)

    def test_half_a_batch_has_labels_with_balanced_classes(self):
        module = self.made(1)
        selected = (LABELS == 0) | (torch.arange(N) == 1)  # eight samples of class 0, one of class 1
        module.graph.update(selected=selected)
        steps = module.epoch_batches(EpochPlan(1, 200, 8, N, 0, 1, lambda peer: torch.arange(N)))
        assert bool(selected[steps[:, :4]].all())
        assert not selected[steps[:, 4:]].any()
        assert float((LABELS[steps[:, :4]] == 1).float().mean()) == pytest.approx(0.5, abs=0.06)

    def test_training_without_an_encoder_is_refused(self):
        with pytest.raises(
            ValueError, match=r"expected a pre-trained encoder for REED, got pretrained: null; run first"
        ):
            trainer(2).fit(REED(**SMALL, warmup_epochs=1), data())


class TestCREMA:
    def test_the_credibility_of_a_sequence_is_a_geometric_mean(self):
        scores = torch.tensor([[0.5, 0.8, 0.9], [0.5, 0.8, 0.9], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]])
        found = sequence_credibility(scores, torch.tensor([3, 7, 1, 0])).tolist()
        assert found == pytest.approx([0.36 ** (1 / 3), 0.36 ** (1 / 3), 0.3, 1.0])

    def test_labels_and_weights_are_those_of_the_loop_over_samples(self):
        module = ready(CREMA(**SMALL, warmup_epochs=1, window=2, confidence=0.6), 3)
        generator, past = torch.Generator().manual_seed(0), []
        for _ in range(2):
            logits = 2 * torch.randn(N, C, generator=generator) + 4 * F.one_hot(
                (LABELS + (torch.arange(N) > 15)) % C, C
            )
            loss = F.cross_entropy(logits, LABELS, reduction="none")
            found = {"logits": logits, "loss": loss, "labels": LABELS, "index": torch.arange(N)}
            module.predict_train = lambda *_, found=found, **__: found
            module.begin_epoch()
            past.append((clean_probability(loss), logits.softmax(1)))
        store, kinds = module.judged, set()
        for i in range(N):
            (first, p), (second, q) = ((score[i], probs[i]) for score, probs in past)
            likelihood, label = math.sqrt(float(first) * float(second)), int(q.argmax())
            if float(second) > 0.5:
                kind, expected = "clean", (int(LABELS[i]), likelihood, likelihood)
            elif int(p.argmax()) == label and float(q.max()) > 0.6:
                kind, expected = "replaced", (label, float(q.max()), float(q.max()))
            else:
                kind, expected = "left out", (int(LABELS[i]), 0.0, float(q.max()))
            kinds.add(kind)
            row = (int(store.labels[i]), float(store.weight[i]), float(store.quality[i]))
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert float(module.label_quality()[i]) == pytest.approx(likelihood, rel=1e-4, abs=1e-5)
        assert kinds == {"clean", "replaced", "left out"}

    def test_nothing_is_replaced_before_the_window_is_full(self):
        module = ready(CREMA(**SMALL, warmup_epochs=1, window=2, confidence=0.0, threshold=1.0), 1)
        found = {"logits": 9 * F.one_hot(0 * LABELS, C).float(), "loss": torch.arange(N).float()}
        module.predict_train = lambda *_, **__: {**found, "labels": LABELS, "index": torch.arange(N)}
        module.begin_epoch()
        assert torch.equal(module.judged.labels, LABELS)
        assert not module.judged.weight.any()

    def test_a_step_is_the_weighted_mean_and_0_without_weights(self):
        module, given = ready(CREMA(**SMALL, warmup_epochs=1), 1), batch()
        weight, labels = torch.rand(N, generator=torch.Generator().manual_seed(0)), (torch.arange(N) + 1) % C
        module.judged.update(weight=weight, labels=labels)
        found = predictions(module.network, given.images)
        used = weight[given.index].tolist()
        total = -sum(w * math.log(p[int(labels[i])]) for w, p, i in zip(used, found, given.index, strict=True)) / sum(
            used
        )
        assert float(module.training_step(given, 0).detach()) == pytest.approx(total, rel=1e-4)
        module.judged.update(weight=torch.zeros(N))
        assert float(module.training_step(given, 0).detach()) == 0


@pytest.mark.parametrize(
    ("make", "table"),
    [
        (lambda **o: CREMA(**o, warmup_epochs=1), lambda m: m.judged.quality),
        (lambda **o: INCV(**o, warmup_epochs=1, rounds=1), lambda m: m.selection.given_quality),
        (lambda **o: REED(**o, warmup_epochs=1), lambda m: m.graph.given_quality),
    ],
)
def test_masks_follow_the_quality_of_the_method(make, table):
    module, given = ready(make(**SMALL, sanm=SANM(mu=0.5, seed=0)), 1), batch()
    module.trainer.fit_loop.max_batches, held = 4, torch.linspace(0, 1, N)
    table(module)[:] = held
    seen, forward = [], module.sanm.forward
    module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
    module.training_step(given._replace(views=(given.images,) * len(module.views())), 0)
    copies = len(seen[0].ratio) // len(given.index)
    expected = 0.5 * (1 - held[given.index]).repeat(copies)
    torch.testing.assert_close(seen[0].ratio, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [CREMA, INCV, REED])
def test_batches_without_index_are_refused(make):
    with pytest.raises(ValueError, match="expected batches with an index for"):
        ready(make(**SMALL)).training_step(batch()._replace(index=None), 0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: INCV(**SMALL, rounds=0), "expected rounds >= 1, got 0"),
        (lambda: INCV(**SMALL, noise_rate=1.0), r"expected noise_rate in \[0, 1\) or null, got 1.0"),
        (lambda: REED(**SMALL, temperature=0.0), "expected temperature > 0, got 0.0"),
        (lambda: CREMA(**SMALL, window=0), "expected window >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("make", [CREMA, REED, INCV])
def test_a_later_stage_that_cannot_begin_is_refused_before_training(make, encoder):  # noqa: F811
    options = {"pretrained": encoder} if make is REED else {"rounds": 1} if make is INCV else {}
    with pytest.raises(ValueError, match=r"expected max_epochs above the 2 epochs of the stage 'warmup', got 2; raise"):
        trainer(2).fit(make(**SMALL, warmup_epochs=2, **options), data())
