"""PENCIL, Joint-Optim, PLC, SELFIE against loops over samples and classes, and in their limits."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.functional import (
    consistent_votes,
    label_step,
    refurbish,
    refurbished_quality,
    reverse_kl,
    small_loss,
)
from sanm_lightning.methods import PENCIL, PLC, SELFIE, CrossEntropy, JointOptim
from tests.methods.reference import SMALL, C, N, batch, predictions, ready, softmax
from tests.methods.toy import data, trainer


def test_the_divergence_is_that_of_the_prediction_from_the_target():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, C), torch.randn(5, C).softmax(1)
    for value, row, target in zip(reverse_kl(logits, targets), logits.tolist(), targets.tolist(), strict=True):
        p = softmax(row)
        assert float(value) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, target, strict=True)), rel=1e-4)
    assert torch.allclose(reverse_kl(targets.log(), targets), torch.zeros(5), atol=1e-6)


class TestPENCIL:
    @pytest.mark.parametrize("twice", [False, True])
    def test_the_step_of_a_label_is_the_gradient_of_the_loss_of_its_sample(self, twice):
        torch.manual_seed(0)
        logits, prediction = torch.randn(5, C, requires_grad=True), torch.randn(5, C)
        given = F.one_hot(torch.arange(5) % C, C).float()
        d = logits.softmax(1)
        compatibility = F.cross_entropy(d, given, reduction="sum") if twice else -(given * d.log()).sum()
        loss = reverse_kl(prediction, d).sum() / C + 0.3 * compatibility
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(label_step(logits, prediction, given, 0.3, twice), gradient)

    @pytest.mark.parametrize(("epoch", "alpha", "beta"), [(1, 0.1, 0.4), (5, 0.1, 0.4)])
    def test_the_loss_and_the_labels_of_a_step(self, epoch, alpha, beta):
        torch.manual_seed(0)
        module = ready(PENCIL(**SMALL, warmup_epochs=1, label_epochs=2, alpha=alpha, beta=beta, label_lr=3.0), epoch)
        module.labels.logits = torch.randn(N, C)
        before, given = module.labels.logits.clone(), batch()
        loss = module.training_step(given, 0)
        expected = 0.0
        for i, p in enumerate(predictions(module.network, given.images)):
            row = before[given.index[i]].tolist()
            d = softmax(row)
            expected += sum(a * math.log(a / b) for a, b in zip(p, d, strict=True)) / C / len(given.index)
            wanted = row
            if epoch == 1:  # the stage in which the labels are learned
                expected -= beta * sum(a * math.log(a) for a in p) / C / len(given.index)
                y = [float(c == int(given.labels[i])) for c in range(C)]
                wanted = [u - 3.0 * ((b - a) / C + alpha * (b - z)) for u, a, b, z in zip(row, p, d, y, strict=True)]
            assert module.labels.logits[given.index[i]].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        untouched = torch.tensor([i for i in range(N) if i not in given.index.tolist()])
        assert torch.equal(module.labels.logits[untouched], before[untouched])

    def test_the_step_of_a_label_does_not_depend_on_the_batch_size(self):
        after = []
        for sizes in ([6], [2, 4]):
            torch.manual_seed(0)
            module, given = ready(PENCIL(**SMALL, warmup_epochs=0), 1), batch()
            for part in torch.arange(6).split(sizes):
                module.training_step(
                    given._replace(**{k: getattr(given, k)[part] for k in ("images", "labels", "index")}), 0
                )
            after.append(module.labels.logits)
        torch.testing.assert_close(*after)

    def test_the_first_stage_is_cross_entropy_and_leaves_the_labels(self):
        module, given = ready(PENCIL(**SMALL, warmup_epochs=1)), batch()
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), given.labels))
        assert torch.equal(module.labels.logits, 10 * F.one_hot(torch.arange(N) % C, C).float())

    @pytest.mark.parametrize(("epochs", "lengths"), [(320, (70, 130)), (3, (1, 1)), (1, (0, 0)), (-1, (70, 130))])
    def test_the_second_stage_has_the_published_fraction_of_the_run(self, epochs, lengths):
        for kind in (PENCIL, JointOptim):
            stages = ready(kind(**SMALL, warmup_epochs=lengths[0]), max_epochs=epochs).stages()
            assert tuple(stage.epochs for stage in stages) == (*lengths, None)

    @pytest.mark.parametrize(("released", "later"), [(False, 0.1), (True, 0.0)])
    def test_the_rate_of_the_last_stage_falls_at_its_thirds(self, released, later):
        *_, last = PENCIL(**SMALL, released_rates=released).stages()
        assert last.lr == 0.2
        assert [last.factor(step, 9) for step in range(9)] == pytest.approx([1.0] * 3 + [later] * 3 + [later**2] * 3)


class TestJointOptim:
    @pytest.mark.parametrize("prior", [None, [0.1, 0.2, 0.3, 0.4]])
    def test_the_loss_of_a_step(self, prior):
        torch.manual_seed(0)
        module, given = ready(JointOptim(**SMALL, warmup_epochs=1, alpha=1.2, beta=0.8, prior=prior), 1), batch()
        module.learned.update(targets=torch.randn(N, C).softmax(1))
        loss = module.training_step(given, 0)
        found = predictions(module.network, given.images)
        size = len(found)
        expected = -sum(
            float(module.learned.targets[given.index[i], c]) * math.log(found[i][c]) / size
            for i in range(size)
            for c in range(C)
        )
        mean = [sum(p[c] for p in found) / size for c in range(C)]
        wanted = prior or [1 / C] * C
        expected += 1.2 * sum(a * math.log(a / b) for a, b in zip(wanted, mean, strict=True))
        expected -= 0.8 * sum(v * math.log(v) for p in found for v in p) / size
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)

    def test_labels_are_the_mean_predictions_so_far_and_stay_as_they_were_without_any(self):
        module = ready(JointOptim(**SMALL, warmup_epochs=1, window=3), 2)
        first, second = torch.rand(5, C).softmax(1), torch.rand(5, C).softmax(1)
        for rows in (first, second):
            module.predicted.append(torch.arange(5), rows)
        module.begin_epoch()
        torch.testing.assert_close(module.learned.targets[:5], (first + second) / 2)
        assert torch.equal(module.learned.targets[5:], F.one_hot(torch.arange(5, N) % C, C).float())
        torch.testing.assert_close(
            module.label_quality()[:5], ((first + second) / 2)[torch.arange(5), torch.arange(5) % C]
        )

    def test_a_full_window_keeps_the_last_predictions(self):
        module = ready(JointOptim(**SMALL, warmup_epochs=1, window=2), 2)
        rows = torch.rand(3, 1, C).softmax(2)
        for row in rows:
            module.predicted.append(torch.tensor([7]), row)
        module.begin_epoch()
        torch.testing.assert_close(module.learned.targets[7], (rows[1, 0] + rows[2, 0]) / 2)

    @pytest.mark.parametrize(("epoch", "updated"), [(0, False), (1, True), (2, True), (3, True), (4, False)])
    def test_labels_are_replaced_in_the_second_stage_and_once_after_it(self, epoch, updated):
        module = ready(JointOptim(**SMALL, warmup_epochs=1, update_epochs=2), epoch)
        module.predicted.append(torch.arange(N), torch.full((N, C), 1 / C))
        module.begin_epoch()
        assert bool((module.learned.targets == 1 / C).all()) == updated

    def test_the_last_stage_is_cross_entropy_of_a_new_network(self):
        module, given = ready(JointOptim(**SMALL, warmup_epochs=1, update_epochs=1), 5), batch()
        assert module.stage.reset == "network"
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), given.labels))


class TestPLC:
    def corrected(self, predicted: Tensor, **options) -> PLC:
        module = ready(PLC(**SMALL, warmup_epochs=1, **options), 1)
        module.predicted.append(torch.arange(len(predicted)), predicted)
        module.begin_epoch()
        return module

    def test_a_label_is_replaced_below_the_ratio_only(self):
        probs = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.0, 0.2, 0.7, 0.1]])
        module = self.corrected(probs, threshold=0.3)  # ratios of the labels 0, 1, 2, 3: .17, .4, .14, .14
        assert module.corrected.labels.tolist() == [1, 1, 3, 2, *(i % C for i in range(4, N))]
        assert module.corrected.quality[:4].tolist() == pytest.approx([1.0, 0.4, 1.0, 1.0])
        assert module.label_quality()[:4].tolist() == pytest.approx([1 / 6, 0.4, 1 / 7, 1 / 7])
        assert bool((module.label_quality()[4:] == 1).all())

    def test_a_partly_filled_window_does_not_change_the_ratio(self):
        probs = torch.rand(N, C).softmax(1)
        one, other = self.corrected(probs, window=1), self.corrected(probs, window=5)
        assert torch.equal(one.corrected.labels, other.corrected.labels)

    @pytest.mark.parametrize(("flips", "expected"), [(0, 0.4), (1, 0.3)])
    def test_the_threshold_moves_only_if_fewer_than_a_thousandth_change(self, flips, expected):
        probs = F.one_hot(torch.arange(N) % C, C) * 0.6 + 0.1
        probs[:flips] = probs[:flips].roll(1, 1)
        assert float(self.corrected(probs, threshold=0.3).threshold) == pytest.approx(expected)

    def test_the_threshold_has_an_upper_bound_except_in_the_form_of_clothing1m(self):
        probs = F.one_hot(torch.arange(N) % C, C) * 0.6 + 0.1
        assert float(self.corrected(probs, threshold=0.85).threshold) == pytest.approx(0.9)
        assert float(self.corrected(probs, threshold=0.85, softmax_of_mean=True).threshold) == pytest.approx(0.95)

    def test_the_form_of_clothing1m_compares_probabilities_after_a_softmax(self):
        probs = torch.tensor([[0.3, 0.7, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0]])  # gaps .4 and .2; log(1 / .7) is .357
        released = {"threshold": 0.7, "softmax_of_mean": True}
        assert self.corrected(probs, window=1, **released).corrected.labels[:2].tolist() == [1, 1]
        assert self.corrected(probs, window=2, **released).corrected.labels[:2].tolist() == [
            0,
            1,
        ]  # the other half is 0

    def test_the_form_of_clothing1m_replaces_labels_of_uncertain_samples_whatever_the_ratio(self):
        """With 14 classes, the largest value after the softmax is below .1 unless its probability is above about .4."""
        flat = torch.full((2, 14), 0.06)
        flat[0, 3] = flat[1, 5] = 0.22
        options = {**SMALL, "num_classes": 14}
        for module, expected in (
            (PLC(**options, window=1, warmup_epochs=1, threshold=0.2, softmax_of_mean=True), [3, 5]),
            (PLC(**options, window=1, warmup_epochs=1, threshold=0.2), [0, 1]),
        ):
            ready(module, 1)
            module.predicted.append(torch.arange(2), flat)
            module.begin_epoch()
            assert module.corrected.labels[:2].tolist() == expected
            assert float(module.threshold) == pytest.approx(0.3)  # not counted as contradicted

    def test_the_step_of_the_threshold(self):
        probs = F.one_hot(torch.arange(N) % C, C) * 0.6 + 0.1
        assert float(self.corrected(probs, threshold=0.1, threshold_step=0.05).threshold) == pytest.approx(0.15)

    def test_a_step_is_cross_entropy_with_the_current_labels(self):
        module, given = ready(PLC(**SMALL, warmup_epochs=1), 1), batch()
        module.corrected.update(labels=(torch.arange(N) + 1) % C)
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), (given.labels + 1) % C))
        assert module.predicted.mean(given.index).flatten().tolist() == pytest.approx(
            [v for p in predictions(module.network, given.images) for v in p], rel=1e-4
        )


class TestSELFIE:
    def test_votes_agree_by_their_normalized_entropy(self):
        votes = torch.tensor([[4.0, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        majority, doubt = consistent_votes(votes)
        assert majority[:1].tolist() == [0]
        assert doubt.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0], abs=1e-6)

    def test_the_quality_is_the_certainty_the_value_before_or_the_rank_of_the_loss(self):
        votes = torch.tensor([[3.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 2, 0, 0], [2, 1, 0, 0]])
        replaced = torch.tensor([False, True, False, False, False])
        found = refurbish(votes, 3, 0.1, torch.tensor([3, 2, 1, 3, 2]), replaced)
        assert found.labels.tolist() == [0, 2, 1, 3, 2]  # the fourth has two of three predictions
        assert found.replaced.tolist() == [True, True, False, False, False]
        quality = refurbished_quality(found, torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0]), torch.full((5,), 0.7))
        assert quality.tolist() == pytest.approx([1.0, 0.7, 1.0, 0.75, 0.5])

    def test_a_step_uses_small_losses_and_replaced_labels(self):
        """Algorithm 1 of Song et al., one sample at a time."""
        torch.manual_seed(0)
        module = ready(SELFIE(**SMALL, noise_rate=0.5, history=3, uncertainty=0.6, warmup_epochs=1), 1)
        given = batch(7)
        votes = [[1, 1, 1], [1, 1, 2], [0, 1, 2], [3], [2, 2, 2], [], [0, 0, 0]]  # of the samples of the batch
        for i, seen in enumerate(votes):
            for vote in seen:
                module.predicted.append(given.index[i : i + 1], torch.tensor([vote]))
        module.refurbished.replaced[given.index[3]] = True  # in an earlier epoch
        module.refurbished.labels[given.index[3]] = 2
        loss = module.training_step(given, 0)
        found = predictions(module.network, given.images)
        labels, used = [], []
        losses = [-math.log(p[int(y)]) for p, y in zip(found, given.labels, strict=True)]
        smallest = sorted(range(7), key=losses.__getitem__)[: math.ceil(0.5 * 7)]
        for i, seen in enumerate(votes):
            label, replaced = int(given.labels[i]), False
            if i == 3:
                label, replaced = 2, True
            if len(seen) == 3:
                share = [seen.count(c) / 3 for c in range(C)]
                if -sum(s * math.log(s) for s in share if s) / math.log(C) <= 0.6:
                    label, replaced = max(range(C), key=share.__getitem__), True
            labels.append(label)
            if replaced or i in smallest:
                used.append(-math.log(found[i][label]))
        assert float(loss.detach()) == pytest.approx(sum(used) / len(used), rel=1e-4)
        assert module.refurbished.labels[given.index].tolist() == labels
        assert module.refurbished.replaced[given.index].tolist() == [True, True, False, True, True, False, True]

    def test_with_nothing_replaced_it_is_the_small_loss_selection(self):
        module, given = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=1), 1), batch(8)
        loss = module.training_step(given, 0)
        losses = F.cross_entropy(module.network(given.images), given.labels, reduction="none")
        torch.testing.assert_close(loss, losses[small_loss(losses.detach(), 0.5)].mean())

    def test_missing_predictions_count_as_class_0_in_the_form_of_the_code(self):
        module, given = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=1, released_zero_history=True), 1), batch()
        module.training_step(given, 0)
        assert module.refurbished.labels[given.index].tolist() == [0] * 6

    def test_a_restart_keeps_the_labels_and_lowers_the_noise_rate(self):
        module = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=1, restarts=1, run_epochs=3), 3)
        assert [stage.name for stage in module.stages()] == ["warmup", "refurbish", "warmup_2", "refurbish_2"]
        assert [stage.reset for stage in module.stages()] == ["none", "none", "network", "none"]
        module.predicted.append(torch.arange(5), torch.ones(5))
        module.refurbished.replaced[: 3 * N // 4] = True
        module.refurbished.labels[: 3 * N // 4] = 3
        module.begin_stage()
        assert module.refurbished.noise_rate == pytest.approx(0.25)
        assert int(module.predicted.count.sum()) == 0
        assert bool((module.refurbished.labels[: 3 * N // 4] == 3).all())
        state = module.refurbished.get_extra_state()
        fresh = SELFIE(**SMALL, noise_rate=0.5)
        fresh.refurbished.set_extra_state(state)
        assert fresh.refurbished.noise_rate == pytest.approx(0.25)

    def test_a_restart_does_not_raise_the_noise_rate(self):
        module = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=1, restarts=1, run_epochs=3), 3)
        module.refurbished.replaced[: N // 4] = True
        module.begin_stage()
        assert module.refurbished.noise_rate == 0.5

    def test_a_label_replaced_before_a_restart_keeps_its_quality_until_predictions_agree_again(self):
        module, given = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=1), 1), batch()
        module.refurbished.replaced[given.index[0]] = True
        module.refurbished.quality[given.index[0]] = 0.9
        module.training_step(given, 0)
        assert float(module.refurbished.quality[given.index[0]]) == pytest.approx(0.9)

    def test_runs_divide_the_epochs_equally(self):
        module = ready(SELFIE(**SMALL, noise_rate=0.5, warmup_epochs=2, restarts=2), max_epochs=12)
        assert [stage.epochs for stage in module.stages()] == [2, 2, 2, 2, 2, None]

    def test_a_history_longer_than_the_run_is_refused(self):
        module = SELFIE(**SMALL, noise_rate=0.5, history=4, warmup_epochs=1)
        with pytest.raises(
            ValueError, match="expected a history of at most the 3 epochs of a run of SELFIE, got 4; lower"
        ):
            trainer(3).fit(module, data())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SELFIE(**SMALL), r"expected noise_rate in \[0, 1\), got None; set noise_rate \(--model"),
        (
            lambda: SELFIE(**SMALL, noise_rate=0.5, run_epochs=25),
            "expected run_epochs above the 25 warmup_epochs, got 25",
        ),
        (lambda: PENCIL(**SMALL, alpha=-1), "expected alpha >= 0, got -1"),
        (lambda: PLC(**SMALL, threshold=1.5), r"expected threshold in \(0, 1\), got 1.5"),
        (lambda: PLC(**SMALL, threshold_step=0), r"expected threshold_step in \(0, 1\), got 0; use 0.1"),
        (lambda: JointOptim(**SMALL, prior=[0.5, 0.5]), "expected a prior of 4 positive probabilities"),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("make", [PENCIL, PLC, JointOptim, lambda **options: SELFIE(**options, noise_rate=0.5)])
def test_batches_without_index_are_refused_before_the_first_update(make):
    module = ready(make(**SMALL))
    with pytest.raises(ValueError, match="expected batches with an index for"):
        module.training_step(batch()._replace(index=None), 0)


@pytest.mark.parametrize(
    ("make", "epoch", "table"),
    [
        (lambda **o: PENCIL(**o, warmup_epochs=1), 1, lambda m: m.agreement.quality),
        (lambda **o: PLC(**o, warmup_epochs=1), 1, lambda m: m.corrected.quality),
        (lambda **o: SELFIE(**o, noise_rate=0.5, warmup_epochs=1), 1, lambda m: m.refurbished.quality),
        (lambda **o: JointOptim(**o, warmup_epochs=1), 1, lambda m: m.learned.given_quality),
    ],
)
def test_masks_follow_the_quality_of_the_method(make, epoch, table):
    module = ready(make(**SMALL, sanm=SANM(mu=0.5, seed=0)), epoch)
    held = torch.linspace(0, 1, N)
    table(module)[:] = held
    if isinstance(module, JointOptim):
        module.learned.filled = True
    seen = []
    forward = module.sanm.forward
    module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
    module.training_step(given := batch(), 0)
    torch.testing.assert_close(seen[0].ratio, 0.5 * (1 - held[given.index]), rtol=1e-4, atol=1e-4)


def test_cross_entropy_is_their_common_limit():
    """Nothing corrected, nothing left out."""
    given = batch()
    for module in (
        ready(SELFIE(**SMALL, noise_rate=0.0, warmup_epochs=1), 1),
        ready(PLC(**SMALL, warmup_epochs=1), 1),
        ready(JointOptim(**SMALL, warmup_epochs=1, alpha=0, beta=0), 1),
    ):
        torch.manual_seed(0)
        plain = ready(CrossEntropy(**SMALL))
        module.network.load_state_dict(plain.network.state_dict())
        torch.testing.assert_close(module.training_step(given, 0), plain.training_step(given, 0))
