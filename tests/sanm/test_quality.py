"""From losses to the probability that a label is right: the mixture, the table, the window."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.functional import label_margin, soft_cross_entropy
from sanm_lightning.sanm import LabelQuality, clean_probability, fit_mixture, mixture_posterior

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31)
whole_losses = st.lists(st.integers(0, 64), min_size=2, max_size=40)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_groups(clean: int = 60, noisy: int = 40, seed: int = 0) -> Tensor:
    noise = random(clean + noisy, seed=seed)
    return torch.cat([0.3 + 0.05 * noise[:clean], 2.0 + 0.3 * noise[clean:]]).abs()


def one_hot(labels: list[int], classes: int = 4) -> Tensor:
    return F.one_hot(torch.tensor(labels), classes).float()


def saved_and_loaded(state: dict[str, object]) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, object] = torch.load(file, weights_only=True)
    return loaded


class TestCleanProbability:
    @quick
    @given(seeds)
    def test_agrees_with_scikit_learns_own_answer(self, seed: int) -> None:
        losses = two_groups(seed=seed).double()
        scaled = ((losses - losses.min()) / (losses.max() - losses.min())).numpy().reshape(-1, 1)
        model = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
        expected = model.predict_proba(scaled)[:, model.means_[:, 0].argmin()]
        torch.testing.assert_close(clean_probability(losses).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)

    @quick
    @given(seeds)
    def test_matches_the_loop_over_bayes_rule(self, seed: int) -> None:
        losses = two_groups(20, 10, seed=seed)
        mixture = fit_mixture(losses)
        low, high = float(mixture.low), float(mixture.high)
        assert (low, high) == (float(losses.min()), float(losses.max()))
        for loss, posterior in zip(losses.tolist(), mixture_posterior(mixture, losses).tolist(), strict=True):
            value = (loss - low) / (high - low)
            joint = [
                float(w) * math.exp(-((value - float(m)) ** 2) / (2 * float(v))) / math.sqrt(2 * math.pi * float(v))
                for w, m, v in zip(mixture.weights, mixture.means, mixture.variances, strict=True)
            ]
            assert posterior == pytest.approx(joint[0] / sum(joint), rel=1e-4, abs=1e-6)

    @quick
    @given(whole_losses)
    def test_is_a_probability_whatever_the_losses(self, losses: list[int]) -> None:
        out = clean_probability(torch.tensor(losses).float())
        assert out.shape == (len(losses),)
        assert ((out >= 0) & (out <= 1)).all()

    @quick
    @given(whole_losses, st.integers(-6, 6), st.integers(-64, 64))
    def test_knows_neither_scale_nor_origin_of_the_losses(self, losses: list[int], scale: int, shift: int) -> None:
        given_losses = torch.tensor(losses).double()
        moved = given_losses * 2.0**scale + shift  # exact in binary
        assert torch.equal(clean_probability(given_losses), clean_probability(moved))

    def test_trusts_small_losses_and_no_large_ones(self) -> None:
        out = clean_probability(two_groups())
        assert (out[:60] > 0.9).all()
        assert (out[60:] < 0.1).all()

    def test_follows_the_order_of_the_samples(self) -> None:
        losses = two_groups()
        order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            clean_probability(losses[order]), clean_probability(losses)[order], rtol=1e-4, atol=1e-4
        )

    def test_the_same_losses_always_give_the_same_answer_without_a_trace(self) -> None:
        losses = two_groups()
        state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
        first = clean_probability(losses)
        assert torch.equal(first, clean_probability(losses))
        assert torch.equal(losses, two_groups())
        assert torch.equal(torch.get_rng_state(), state)
        assert (np.random.get_state()[1] == numpys).all()  # type: ignore[index]

    @pytest.mark.parametrize("size", [0, 1, 2, 7])
    @pytest.mark.parametrize("value", [0.0, 2.3, -1.0, 1e30])
    def test_of_equal_losses_trusts_every_label(self, size: int, value: float) -> None:
        assert torch.equal(clean_probability(torch.full((size,), value)), torch.ones(size))

    def test_of_two_losses_trusts_the_smaller(self) -> None:
        out = clean_probability(torch.tensor([5.0, 1.0]))
        assert out[0] < 0.5 < out[1]

    @pytest.mark.parametrize("span", [1e-30, 1e30])
    def test_of_extreme_spans_is_finite(self, span: float) -> None:
        assert torch.isfinite(clean_probability(torch.tensor([0.0, 0.1, 1.0, 0.9]) * span)).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_is_float32_without_gradient_to_the_fit(self, dtype: torch.dtype) -> None:
        out = clean_probability(two_groups().to(dtype))
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, clean_probability(two_groups()), rtol=0, atol=0.05)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_refuses_losses_that_are_not_finite(self, bad: float) -> None:
        message = "expected finite losses, got 1 NaN or infinite of 3; check whether training has diverged"
        with pytest.raises(ValueError, match=message):
            clean_probability(torch.tensor([0.0, bad, 1.0]))
        with pytest.raises(ValueError, match=message):
            mixture_posterior(fit_mixture(two_groups()), torch.tensor([0.0, bad, 1.0]))

    @pytest.mark.parametrize("shape", [(), (3, 1), (2, 3)])
    def test_refuses_losses_that_are_no_list(self, shape: tuple[int, ...]) -> None:
        for answer in (
            clean_probability,
            fit_mixture,
            lambda losses: mixture_posterior(fit_mixture(two_groups()), losses),
        ):
            with pytest.raises(ValueError, match=r"expected losses \(N,\), got shape \("):
                answer(torch.ones(shape))


class TestMixture:
    def test_has_its_lower_mean_first_and_weights_of_sum_one(self) -> None:
        for seed in range(5):
            mixture = fit_mixture(two_groups(seed=seed))
            assert mixture.means[0] < mixture.means[1]
            assert float(mixture.weights.sum()) == pytest.approx(1)
            assert (mixture.variances > 0).all()

    def test_scores_losses_that_it_was_not_fitted_to(self) -> None:
        mixture = fit_mixture(two_groups())
        out = mixture_posterior(mixture, torch.tensor([0.3, 2.0]))
        assert out[0] > 0.9
        assert out[1] < 0.1
        assert mixture_posterior(mixture, torch.zeros(0)).shape == (0,)

    def test_counts_losses_beyond_its_range_as_its_edge(self) -> None:
        mixture = fit_mixture(two_groups())
        edges = mixture_posterior(mixture, torch.stack([mixture.low, mixture.high]))
        assert torch.equal(mixture_posterior(mixture, torch.tensor([-100.0, 100.0])), edges)

    def test_of_equal_losses_trusts_new_ones_too(self) -> None:
        assert torch.equal(mixture_posterior(fit_mixture(torch.ones(5)), torch.tensor([-9.0, 1.0, 9.0])), torch.ones(3))

    def test_is_fitted_with_the_published_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[GaussianMixture] = []

        class Spy(GaussianMixture):
            def fit(self, *args: object) -> object:
                asked.append(self)
                return super().fit(*args)

        monkeypatch.setattr("sanm_lightning.functional.mixture.GaussianMixture", Spy)
        fit_mixture(two_groups())
        published = {"n_components": 2, "max_iter": 10, "tol": 1e-2, "reg_covar": 5e-4}
        assert {name: asked[0].get_params()[name] for name in published} == published


class TestEvidence:
    def test_the_loss_matches_the_loop_over_cross_entropy(self) -> None:
        logits, targets = random(5, 4), random(5, 4, seed=1).softmax(1)
        for i, loss in enumerate(soft_cross_entropy(logits, targets).tolist()):
            total = sum(math.exp(float(z)) for z in logits[i])
            assert loss == pytest.approx(
                -sum(float(targets[i, j]) * math.log(math.exp(float(logits[i, j])) / total) for j in range(4)), rel=1e-5
            )

    def test_the_margin_matches_the_loop(self) -> None:
        logits = random(5, 4)
        labels = [0, 3, 1, 2, 2]
        for i, margin in enumerate(label_margin(logits, one_hot(labels)).tolist()):
            others = [float(z) for j, z in enumerate(logits[i]) if j != labels[i]]
            assert margin == pytest.approx(max(others) - float(logits[i, labels[i]]), rel=1e-5)

    @pytest.mark.parametrize("evidence", [soft_cross_entropy, label_margin])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_is_float32_and_leaves_its_inputs_alone(self, evidence: object, dtype: torch.dtype) -> None:
        logits, targets = random(3, 4).to(dtype), one_hot([0, 1, 2]).to(dtype)
        before = logits.clone()
        assert evidence(logits, targets).dtype == torch.float32  # type: ignore[operator]
        assert torch.equal(logits, before)

    @pytest.mark.parametrize("evidence", [soft_cross_entropy, label_margin])
    def test_is_smaller_for_a_label_that_the_network_believes(self, evidence: object) -> None:
        logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0]])
        believed, doubted = evidence(logits, one_hot([0, 1]))  # type: ignore[operator]
        assert believed < doubted


def logits_of_loss(losses: Tensor) -> Tensor:
    """Logits over two classes whose cross-entropy for class 0 is ``losses``."""
    right = (-losses).exp()
    return torch.stack([right.log(), (1 - right).log()], 1)


def given_zero(size: int) -> Tensor:
    return one_hot([0] * size, 2)


class TestLabelQualityWithIndices:
    @pytest.mark.parametrize("history", ["last", "mean", 0.8])
    def test_is_the_clean_probability_of_a_history_kept_by_hand(self, history: str | float) -> None:
        label_quality = LabelQuality(history=history)  # type: ignore[arg-type]
        label_quality.reset(30)
        kept: list[float] = []
        for epoch in range(3):
            losses = two_groups(20, 10, seed=epoch)
            for half in (torch.arange(15), torch.arange(15, 30)):
                label_quality.update(logits_of_loss(losses[half]), given_zero(15), half)
            label_quality.fit()
            for i, loss in enumerate(losses.tolist()):
                if epoch == 0:
                    kept.append(loss)
                else:
                    old = {"last": 0.0, "mean": epoch / (epoch + 1)}.get(str(history), history)
                    kept[i] = float(old) * kept[i] + (1 - float(old)) * loss
        index = torch.tensor([3, 25, 3, 0])
        out = label_quality(torch.zeros(4, 2), given_zero(4), index)
        torch.testing.assert_close(out, clean_probability(torch.tensor(kept))[index], rtol=1e-3, atol=1e-3)

    def test_trusts_every_label_until_something_is_known(self) -> None:
        label_quality = LabelQuality()
        label_quality.reset(4)
        index = torch.tensor([0, 3])
        assert torch.equal(label_quality(random(2, 2), given_zero(2), index), torch.ones(2))
        label_quality.update(random(2, 2), given_zero(2), index)
        assert torch.equal(label_quality(random(2, 2), given_zero(2), index), torch.ones(2))
        label_quality.fit()
        label_quality.update(random(2, 2), given_zero(2), torch.tensor([1, 2]))
        assert torch.equal(label_quality.quality[1:3], torch.ones(2))

    def test_a_sample_never_seen_is_trusted_and_does_not_enter_the_mixture(self) -> None:
        label_quality, losses = LabelQuality(), two_groups(6, 4) + 2  # far from the zero of a sample never seen
        label_quality.reset(30)
        label_quality.update(logits_of_loss(losses), given_zero(10), torch.arange(10))
        label_quality.fit()
        torch.testing.assert_close(label_quality.quality[:10], clean_probability(losses), rtol=1e-3, atol=1e-3)
        assert (label_quality.quality[6:10] < 0.1).all()
        assert torch.equal(label_quality.quality[10:], torch.ones(20))

    def test_a_reset_forgets(self) -> None:
        label_quality = LabelQuality()
        label_quality.reset(10)
        label_quality.update(logits_of_loss(two_groups(6, 4)), given_zero(10), torch.arange(10))
        label_quality.fit()
        assert bool((label_quality.quality < 1).any())
        label_quality.reset(3)
        assert torch.equal(label_quality.quality, torch.ones(3))
        assert label_quality.values is None

    def test_a_table_of_another_size_trusts_every_label_until_the_next_fit(self) -> None:
        label_quality = LabelQuality()
        label_quality.reset(4)
        label_quality.fit()
        label_quality.bank.reset(6)  # by the callback, for another training set
        assert torch.equal(label_quality(random(2, 2), given_zero(2), torch.tensor([5, 0])), torch.ones(2))

    def test_the_margin_can_stand_in_for_the_loss(self) -> None:
        label_quality, logits = LabelQuality("margin"), random(12, 4)
        targets = one_hot([0, 1, 2, 3] * 3)
        label_quality.reset(12)
        label_quality.update(logits, targets, torch.arange(12))
        label_quality.fit()
        torch.testing.assert_close(label_quality.quality, clean_probability(label_margin(logits, targets)))

    def test_says_so_when_training_has_diverged(self) -> None:
        label_quality = LabelQuality()
        label_quality.reset(3)
        label_quality.update(torch.full((3, 2), float("nan")), given_zero(3), torch.arange(3))
        with pytest.raises(ValueError, match="expected finite losses, got 3 NaN or infinite of 3"):
            label_quality.fit()

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
    def test_a_wrong_quality_on_another_device_is_told_at_the_next_fit_once(self, wrong: float) -> None:
        class Elsewhere(torch.Tensor):
            """A tensor that says it is on a GPU."""

            device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]

        sanm = SANM()
        for values in ([0.0, 1.0], [wrong, 0.5], [0.5, 0.5]):  # a later good one does not forgive
            sanm._check_later(torch.tensor(values).as_subclass(Elsewhere))
        with pytest.raises(ValueError, match=r"expected label quality in \[0, 1\], got values outside of it"):
            sanm.fit_quality()
        sanm._check_later(torch.tensor([0.0, 1.0]).as_subclass(Elsewhere))
        sanm.fit_quality()

    def test_takes_logits_with_gradient_and_keeps_none(self) -> None:
        label_quality, logits = LabelQuality(), random(4, 2).requires_grad_()
        label_quality.reset(4)
        label_quality.update(logits, given_zero(4), torch.arange(4))
        label_quality.fit()
        assert not label_quality(logits, given_zero(4), torch.arange(4)).requires_grad


class TestLabelQualityWithoutIndices:
    @pytest.mark.parametrize("batches", [[3], [8], [3, 4], [5, 5], [8, 8, 1], [11], [3, 19], [8, 8, 8], [2, 7, 7, 7]])
    def test_scores_under_a_mixture_of_the_latest_of_the_window(self, batches: list[int]) -> None:
        label_quality, seen = LabelQuality(window=8), []
        for step, size in enumerate(batches):
            losses = 0.2 + 0.02 * random(size, seed=step) + 2 * (torch.arange(size) % 2)  # no doubt where they part
            label_quality.update(logits_of_loss(losses), given_zero(size))
            seen += losses.tolist()
        label_quality.fit()
        new = torch.tensor([0.15, 0.2, 0.25, 2.15, 2.2, 2.25])
        expected = mixture_posterior(fit_mixture(torch.tensor(seen[-8:])), new)
        torch.testing.assert_close(label_quality(logits_of_loss(new), given_zero(6)), expected, rtol=1e-2, atol=1e-2)
        assert sorted(label_quality._recent[: len(seen)].tolist()) == pytest.approx(sorted(seen[-8:]), rel=1e-3)

    def test_trusts_every_label_before_the_first_fit(self) -> None:
        label_quality = LabelQuality()
        label_quality.update(random(4, 2), given_zero(4))
        assert torch.equal(label_quality(random(3, 2), given_zero(3)), torch.ones(3))

    def test_a_sample_without_a_table_goes_to_the_window_even_with_an_index(self) -> None:
        label_quality, losses = LabelQuality(window=10), two_groups(6, 4)
        label_quality.update(logits_of_loss(losses), given_zero(10), torch.arange(10))
        label_quality.fit()
        out = label_quality(logits_of_loss(losses), given_zero(10), torch.arange(10))
        torch.testing.assert_close(out, clean_probability(losses), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_takes_logits_and_targets_of_any_precision(self, dtype: torch.dtype) -> None:
        label_quality = LabelQuality(window=4)
        label_quality.update(random(6, 2).to(dtype), given_zero(6).to(dtype))
        label_quality.fit()
        assert label_quality(random(3, 2).to(dtype), given_zero(3).to(dtype)).dtype == torch.float32

    def test_says_so_when_training_has_diverged(self) -> None:
        label_quality = LabelQuality(window=4)
        label_quality.update(torch.full((3, 2), float("nan")), given_zero(3))
        with pytest.raises(ValueError, match="expected finite losses, got 3 NaN or infinite of 3"):
            label_quality.fit()


class TestStateOfLabelQuality:
    @pytest.mark.parametrize("indexed", [True, False])
    @pytest.mark.parametrize("history", ["last", "mean", 0.5])
    def test_in_the_middle_of_an_epoch_loses_nothing(self, indexed: bool, history: str | float) -> None:
        def step(label_quality: LabelQuality, seed: int) -> None:
            index = torch.arange(10) if indexed else None
            label_quality.update(logits_of_loss(two_groups(6, 4, seed=seed)), given_zero(10), index)

        label_quality = LabelQuality(history=history, window=13)  # type: ignore[arg-type]
        if indexed:
            label_quality.reset(10)
        step(label_quality, 0)
        label_quality.fit()
        step(label_quality, 1)
        resumed = LabelQuality(history=history, window=13)  # type: ignore[arg-type]
        resumed.load_state_dict(saved_and_loaded(label_quality.state_dict()))
        between = torch.linspace(0.3, 2.0, 10)  # where the two Gaussians overlap
        probe = logits_of_loss(between), given_zero(10), torch.arange(10) if indexed else None
        assert torch.equal(resumed(*probe), label_quality(*probe))
        for each in (label_quality, resumed):
            step(each, 2)
            each.fit()
        assert torch.equal(resumed(*probe), label_quality(*probe))
        assert not torch.equal(resumed(*probe), torch.ones(10))

    def test_is_a_copy(self) -> None:
        label_quality = LabelQuality(window=4)
        label_quality.update(random(3, 2), given_zero(3))
        state = label_quality.state_dict()
        before = state["_extra_state"]["recent"].clone()
        other = LabelQuality(window=4)
        other.load_state_dict(state)
        for each in (label_quality, other):
            each.update(random(4, 2, seed=5), given_zero(4))
        assert torch.equal(state["_extra_state"]["recent"], before)

    def test_a_change_of_precision_of_the_model_is_not_for_it(self) -> None:
        label_quality, losses = LabelQuality(), two_groups(6, 4)
        label_quality.reset(10)
        label_quality.update(logits_of_loss(losses), given_zero(10), torch.arange(10))
        label_quality.fit()
        before = label_quality.quality.clone()
        label_quality.to(torch.float16)
        assert torch.equal(label_quality.quality, before)

    def test_has_neither_parameters_nor_buffers(self) -> None:
        assert not [*LabelQuality().parameters(), *LabelQuality().buffers()]


class TestArgumentsOfLabelQuality:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"evidence": "accuracy"}, "expected evidence 'loss' or 'margin', got 'accuracy'"),
            ({"history": "all"}, "expected history 'last', 'mean' or a momentum in .*, got 'all'"),
            ({"history": 0.0}, "expected history .*, got 0.0"),
            ({"history": 1.0}, "expected history .*, got 1.0"),
            ({"history": float("nan")}, "expected history .*, got nan"),
            ({"window": 1}, "expected a window of at least 2 samples, got 1"),
        ],
    )
    def test_are_refused_with_what_was_expected(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LabelQuality(**arguments)  # type: ignore[arg-type]
