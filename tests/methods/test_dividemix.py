"""DivideMix: its formulas against slow loops, its division, its fallbacks."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from sanm_lightning import SANM, NoisyBatch
from sanm_lightning.functional import (
    Mixed,
    clean_probability,
    co_refine,
    linear_ramp,
    mixmatch_loss,
    negative_entropy,
    prior_kl,
    repeated_draw,
    sharpen,
    threshold_split,
)
from sanm_lightning.methods import C2D, DivideMix
from sanm_lightning.methods.dividemix import Division
from tests.methods.toy import data, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(**options) -> DivideMix:
    torch.manual_seed(0)
    return DivideMix(**{**SMALL, "warmup_epochs": 1, **options})


class TestFormulas:
    def test_sharpening_against_a_loop(self):
        p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
        for row, got in zip(p.tolist(), sharpen(p, 0.5).tolist(), strict=True):
            powers = [value**2 for value in row]
            assert got == pytest.approx([power / sum(powers) for power in powers])

    def test_sharpening_at_temperature_one_changes_nothing(self):
        p = torch.rand(5, 4).softmax(1)
        torch.testing.assert_close(sharpen(p, 1.0), p)

    def test_refining_trusts_a_clean_label_and_the_network_otherwise(self):
        y, p = torch.eye(3), torch.full((3, 3), 1 / 3)
        refined = co_refine(y, torch.tensor([1.0, 0.0, 0.25]), p)
        torch.testing.assert_close(refined[0], y[0])
        torch.testing.assert_close(refined[1], p[1])
        assert refined[2].tolist() == pytest.approx([0.25, 0.25, 0.5])

    def test_both_losses_against_loops(self):
        torch.manual_seed(1)
        logits, targets = torch.randn(6, 3), torch.rand(6, 3).softmax(1)
        labelled = torch.tensor([True, False, True, True, False, False])
        entropy, squares = [], []
        for z, t, is_labelled in zip(logits.tolist(), targets.tolist(), labelled.tolist(), strict=True):
            total = sum(math.exp(value) for value in z)
            p = [math.exp(value) / total for value in z]
            if is_labelled:
                entropy.append(-sum(a * math.log(b) for a, b in zip(t, p, strict=True)))
            else:
                squares.append(sum((b - a) ** 2 for a, b in zip(t, p, strict=True)) / 3)
        supervised, unsupervised = mixmatch_loss(logits, targets, labelled)
        assert float(supervised) == pytest.approx(sum(entropy) / 3, rel=1e-5)
        assert float(unsupervised) == pytest.approx(sum(squares) / 3, rel=1e-5)

    def test_all_labelled_is_cross_entropy_alone(self):
        logits, targets = torch.randn(6, 3), torch.rand(6, 3).softmax(1)
        supervised, unsupervised = mixmatch_loss(logits, targets, torch.ones(6, dtype=torch.bool))
        torch.testing.assert_close(supervised, torch.nn.functional.cross_entropy(logits, targets))
        assert unsupervised == 0

    def test_the_penalty_is_the_divergence_from_the_uniform_prior(self):
        logits = torch.randn(7, 4)
        mean = [sum(row[c] for row in logits.softmax(1).tolist()) / 7 for c in range(4)]
        assert float(prior_kl(logits)) == pytest.approx(sum(0.25 * math.log(0.25 / m) for m in mean), rel=1e-5)
        assert float(prior_kl(torch.zeros(3, 4))) == pytest.approx(0, abs=1e-6)

    def test_negative_entropy_is_finite_where_a_probability_underflows(self):
        assert negative_entropy(torch.tensor([[200.0, 0.0, 0.0]])) == 0
        assert float(negative_entropy(torch.zeros(2, 4))) == pytest.approx(-math.log(4))

    @pytest.mark.parametrize(("epochs", "weight"), [(-1, 0), (0, 0), (4, 0.25), (16, 1), (40, 1)])
    def test_the_ramp(self, epochs, weight):
        assert linear_ramp(epochs, 16) == weight


class TestSets:
    @given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30), st.floats(0, 1), st.booleans())
    def test_neither_set_is_ever_empty(self, clean, threshold, clip):
        labelled, _ = threshold_split(torch.tensor(clean), threshold, clip)
        assert 0 < int(labelled.sum()) < len(clean)

    def test_labelled_are_those_above_the_threshold(self):
        labelled, empty = threshold_split(torch.tensor([0.2, 0.5, 0.51, 0.9]), 0.5)
        assert labelled.tolist() == [False, False, True, True]
        assert not empty

    def test_a_threshold_outside_the_range_is_moved_inside_and_said(self):
        labelled, empty = threshold_split(torch.tensor([0.1, 0.3, 0.2]), 0.5)
        assert labelled.tolist() == [False, True, False]
        assert empty

    @given(st.integers(1, 9), st.integers(0, 40))
    def test_every_round_serves_each_sample_once(self, size, length):
        pool = torch.arange(100, 100 + size)
        order = repeated_draw(pool, length, torch.Generator().manual_seed(0))
        assert len(order) == length
        for start in range(0, length - size + 1, size):
            assert sorted(order[start : start + size].tolist()) == pool.tolist()


class TestDivision:
    def test_losses_are_normalised_per_network_and_averaged_over_the_last_epochs(self):
        division = Division(3)
        division.reset(20)
        assert not division.done
        epochs = [torch.rand(2, 20) * 7 + 1 for _ in range(4)]
        for losses in epochs:
            division.divide(losses, 10)
        assert division.done
        for number in (0, 1):
            scaled = [(e[number] - e[number].min()) / (e[number].max() - e[number].min()) for e in epochs[1:]]
            torch.testing.assert_close(division.clean[:, number], clean_probability(sum(scaled) / 3, normalize=False))

    def test_the_mixture_of_means_over_epochs_is_fitted_to_the_means_as_they_are(self):
        """As in the code: means of normalized losses are not normalized again."""
        division = Division(2)
        division.reset(40)
        generator = torch.Generator().manual_seed(0)
        epochs = [torch.rand(2, 40, generator=generator) ** 2 for _ in range(2)]
        for losses in epochs:
            division.divide(losses, 10)
        for number in (0, 1):
            scaled = [(e[number] - e[number].min()) / (e[number].max() - e[number].min()) for e in epochs]
            means = (sum(scaled) / 2).double().numpy().reshape(-1, 1)
            assert means.max() < 0.99, "normalization would change the means"
            model = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(means)
            expected = model.predict_proba(means)[:, model.means_.argmin()]
            torch.testing.assert_close(
                division.clean[:, number].double(), torch.from_numpy(expected), atol=1e-5, rtol=0
            )

    def test_equal_losses_trust_every_label(self):
        division = Division()
        division.reset(5)
        division.divide(torch.ones(2, 5), 10)
        assert bool((division.clean == 1).all())

    def test_each_network_learns_on_the_division_of_the_other(self):
        module = method()
        clean = torch.stack([torch.linspace(0, 1, 64), torch.linspace(1, 0, 64)], 1)
        module.begin_epoch = lambda: setattr(module.division, "clean", clean)
        blocks = []
        mixmatch = module.mixmatch
        module.mixmatch = lambda batch, number, *rest: blocks.append((number, batch)) or mixmatch(batch, number, *rest)
        module.warmup_epochs = 0
        trainer(1).fit(module, data())
        assert [number for number, _ in blocks] == [0, 1] * 4
        for number, batch in blocks:
            other = clean[:, 1 - number][batch.index]
            assert len(other) == 16
            assert bool((other[:8] > 0.5).all())
            assert bool((other[8:] <= 0.5).all())

    def test_the_scores_are_the_losses_of_unaugmented_images(self):
        module, source = method(warmup_epochs=0), data()
        trainer(1, limit_train_batches=1).fit(module, source)
        module.eval()
        batch = source.batch("train", torch.arange(64))
        run = trainer(0)
        run.datamodule = source  # scoring by hand, outside of a fit
        module.trainer = run
        with torch.no_grad():
            scores = module.predict_train("loss", network=None)["loss"]
            expected = torch.nn.functional.cross_entropy(module.network2(batch.images), batch.labels, reduction="none")
        torch.testing.assert_close(scores[1], expected)
        assert not module.training


class TestSteps:
    def test_warm_up_is_cross_entropy_of_each_network(self):
        module = method(warmup_epochs=5)
        source = data()
        losses = []
        module.on_train_batch_end = lambda outputs, batch, i: losses.append((outputs["loss"], batch))
        expected = []
        step = module.training_step

        def watched(batch, batch_idx):
            parts = [
                torch.nn.functional.cross_entropy(n(batch.images), batch.labels)
                for n in (module.network, module.network2)
            ]
            expected.append(torch.stack(parts).sum().detach())
            return step(batch, batch_idx)

        module.training_step = watched
        trainer(6, limit_train_batches=1, limit_val_batches=0).fit(module, source)
        torch.testing.assert_close(torch.stack([loss for loss, _ in losses[:5]]), torch.stack(expected[:5]))
        assert len(losses) == 6

    def test_an_empty_set_is_said_and_survived(self):
        module = method(p_threshold=1.0, warmup_epochs=0)
        with pytest.warns(
            UserWarning, match=r"expected labeled and unlabeled samples for network [12] .* p_threshold 1\.0"
        ):
            trainer(1).fit(module, data())

    def test_alternating_trains_one_network_per_epoch(self):
        module = method(warmup_epochs=0, alternate=True, clip_threshold=True)
        before = [p.detach().clone() for p in module.parameters()]
        trainer(1).fit(module, data())
        moved = [not torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True)]
        first = len(list(module.network.parameters()))
        assert all(moved[:first])
        assert not any(moved[first:])

    def test_released_views_add_two_masked_copies_of_the_first_target_view(self):
        sanm = SANM(regions="peak_and_trough", anchor="corner", place="energy", quality="oracle", seed=0)
        views = {"train_views": ["weak", "weak", "none"], "sanm_views": "first"}
        module = method(sanm=sanm, warmup_epochs=0, clip_threshold=True, **views)
        mixed = []
        forward = module.network.forward_features

        def watched(images):
            if torch.is_grad_enabled():
                mixed.append(len(images))
            return forward(images)

        module.network.forward_features = watched
        trainer(1, limit_train_batches=1).fit(module, data())
        assert mixed == [(3 + 2) * 16, 2 * 16], "the pool, then the masked views for the decoder"

    @staticmethod
    def asked(module) -> list[tuple]:
        """Targets and quality that SANM is given in a fit of one epoch."""
        seen = []
        for sanm in (module.sanm, module.sanm2):
            forward = sanm.forward

            def watched(network, images, targets, quality, *rest, forward=forward):
                seen.append((targets, quality))
                return forward(network, images, targets, quality, *rest)

            sanm.forward = watched
        trainer(1).fit(module, data())
        return seen

    def test_oracle_quality_judges_the_targets_that_are_learned(self):
        module = method(sanm=SANM(quality="oracle", seed=0), warmup_epochs=0, clip_threshold=True)
        judged, learn = [], module.learn

        def watched(batch, targets, network=0, **options):
            judged.append((targets.argmax(1) == batch.true_labels).float())
            return learn(batch, targets, network, **options)

        module.learn = watched
        for (_, quality), expected in zip(self.asked(module), judged, strict=True):
            assert torch.equal(quality, expected)

    @pytest.mark.parametrize("word", ["given", "guess"])
    def test_an_unlabelled_sample_is_trusted_by_its_given_label_or_by_its_guess(self, word):
        module = method(sanm=SANM(seed=0), warmup_epochs=0, clip_threshold=True, unlabelled_quality=word)
        seen = self.asked(module)
        clean = {round(value, 6) for value in module.division.clean.flatten().tolist()}
        for targets, quality in seen:
            guessed, known = quality.view(2, 16)[:, 8:], quality.view(2, 16)[:, :8]  # two looks, half of each labelled
            assert {round(value, 6) for value in known.flatten().tolist()} <= clean
            if word == "guess":
                assert torch.equal(guessed, targets.amax(1).view(2, 16)[:, 8:])
            else:
                assert {round(value, 6) for value in guessed.flatten().tolist()} <= clean


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lambda_u": -1.0}, "lambda_u >= 0, got -1.0"),
            ({"p_threshold": 1.5}, r"p_threshold in \[0, 1\], got 1.5"),
            ({"temperature": 0.0}, "temperature > 0"),
            ({"target_views": []}, "at least one of target_views"),
            ({"loss_history": 0}, "loss_history >= 1"),
            ({"sanm_views": "some"}, "sanm_views 'all' or 'first'"),
            ({"unlabelled_quality": "none"}, "unlabelled_quality 'given' or 'guess', got 'none'"),
        ],
    )
    def test_arguments_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            method(**options)

    def test_a_loader_of_pairs_is_refused_before_training(self):
        pairs = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 4)
        with pytest.raises(ValueError, match="expected a data module of this package for DivideMix"):
            trainer(1).fit(method(), torch.utils.data.DataLoader(pairs, 4))

    def test_c2d_without_an_encoder_says_what_to_run(self):
        with pytest.raises(ValueError, match="run first 'sanm fit --config configs/method/simclr"):
            trainer(1).fit(C2D(**SMALL), data())


def test_both_networks_of_c2d_start_from_the_encoder_with_heads_of_their_own(tmp_path):
    torch.manual_seed(9)
    encoder = DivideMix(**SMALL).network
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    module = C2D(**SMALL, pretrained=str(tmp_path / "encoder.pt"), warmup_epochs=1)
    starts = []
    module.on_train_start = lambda: starts.append(
        {k: v.clone() for k, v in module.state_dict().items() if "extra" not in k}
    )
    trainer(2, limit_train_batches=1).fit(module, data())
    for key, value in encoder.state_dict().items():
        if ".fc." not in key:
            assert torch.equal(starts[0][f"network.{key}"], value)
            assert torch.equal(starts[0][f"network2.{key}"], value)
    assert not torch.equal(starts[0]["network.network.fc.weight"], starts[0]["network2.network.fc.weight"])
    assert not same(module.network, module.network2)


class TestHalves:
    """What the unlabeled half has to do with the labeled one, with batch norm as in training."""

    @pytest.mark.parametrize("together", [False, True])
    def test_refined_targets_depend_on_unlabelled_images_only_if_both_are_guessed_together(self, together):
        module = method(guess_together=together)
        views = [torch.rand(8, 3, 16, 16) for _ in range(2)]
        others = [torch.cat([view[:4], view[4:] * 0.2]) for view in views]
        labels, clean = torch.eye(4)[torch.arange(8) % 4], torch.full((8,), 0.3)
        for network in module.networks:
            network.train()
        (one, maps), (two, other_maps) = (module.guess(0, v, labels, clean, 4) for v in (views, others))
        assert torch.equal(one[:4], two[:4]) != together
        assert torch.equal(maps[0][:4], other_maps[0][:4]) != together
        assert not torch.allclose(one[4:], two[4:])

    @pytest.mark.parametrize("sanm", [False, True])
    def test_without_weight_c2d_runs_the_network_on_the_mixed_labelled_views_only(self, sanm, monkeypatch):
        """The loss is the cross-entropy of these rows and their prior term; their partners are of both halves."""
        module = C2D(**SMALL, lambda_u=0.0, sanm=SANM(mask=False, reconstruct=False) if sanm else None)
        module.division.reset(20)
        module.division.clean = torch.rand(20, 2)
        module.stream = lambda *_, **__: None
        views = tuple(torch.rand(8, 3, 16, 16) for _ in range(2))
        batch = NoisyBatch(views[0], torch.arange(8) % 4, torch.arange(8), None, views)
        partners, seen = torch.arange(15, -1, -1), []

        def mix(images, targets, **_):
            mixed = Mixed(images, targets, 0.8, partners)
            return mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))

        monkeypatch.setattr(module.networks[0], "forward_head", spy(module.networks[0].forward_head, seen))
        loss = module.mixmatch(batch, 0, mix, 0.0)
        assert [len(features) for features in seen if features.requires_grad] == [8]
        targets, _ = module.guess(0, list(views), module.one_hot(batch.labels), module.division.clean[:, 1][:8], 4)
        images, wanted = torch.cat(views), torch.cat([targets, targets])
        rows = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
        images, wanted = (0.8 * part[rows] + 0.2 * part[partners[rows]] for part in (images, wanted))
        network = copy.deepcopy(module.networks[0])
        logits = network.forward_head(network.forward_features(images))
        expected = -(wanted * logits.log_softmax(1)).sum(1).mean() + prior_kl(logits)
        if not sanm:  # SANM softens the targets of the views
            torch.testing.assert_close(loss, expected)

    def test_with_weight_or_in_dividemix_all_views_are_run(self, monkeypatch):
        for kind, weight in ((C2D, 25.0), (DivideMix, 0.0)):
            module, seen = kind(**SMALL, lambda_u=weight), []
            module.division.reset(20)
            module.stream = lambda *_, **__: None
            views = tuple(torch.rand(8, 3, 16, 16) for _ in range(2))
            batch = NoisyBatch(views[0], torch.arange(8) % 4, torch.arange(8), None, views)
            monkeypatch.setattr(module.networks[0], "forward_head", spy(module.networks[0].forward_head, seen))
            module.mixmatch(batch, 0, lambda images, targets: Mixed(images, targets, 1.0, torch.arange(16)), weight)
            assert [len(features) for features in seen if features.requires_grad] == [16]


def spy(function, seen):
    def watched(first, *others, **options):
        seen.append(first)
        return function(first, *others, **options)

    return watched
