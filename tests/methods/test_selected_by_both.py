"""Co-teaching+ and M-correction against loops over samples, and in their limits."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.functional import beta_mixture_posterior, fit_beta_mixture, guided_mixup, mixup, small_loss_among
from sanm_lightning.methods import CoTeaching, CoTeachingPlus, MCorrection
from tests.methods.reference import SMALL, C, batch, predictions, ready, softmax


def separate(network, images, seed) -> None:
    """Give a new network a classifier that predicts different classes for different images."""
    torch.manual_seed(seed)
    head = network.get_classifier()
    with torch.no_grad():
        features = network.forward_head(network.forward_features(images), pre_logits=True)
        head.weight.normal_(0, 20)
        head.bias.copy_(-(features @ head.weight.T).mean(0))


class TestCoTeachingPlus:
    def test_small_losses_are_chosen_among_the_candidates(self):
        losses = torch.tensor([3.0, 1.0, 2.0, 0.5, 4.0])
        candidates = torch.tensor([True, False, True, False, True])
        assert small_loss_among(losses, 0.7, candidates).tolist() == [True, False, True, False, False]
        assert small_loss_among(losses, 0.0, candidates).tolist() == [False, False, True, False, False]
        assert torch.equal(small_loss_among(losses, 1.0, candidates), candidates)
        assert not bool(small_loss_among(losses, 0.5, torch.zeros(5, dtype=torch.bool)).any())

    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("scale", [False, True])
    @pytest.mark.parametrize("lost", [False, True])
    def test_the_loss_of_a_step(self, double, scale, lost):
        """Algorithm 1 of Yu et al., and the code's softmax of probabilities, second division and lost sample."""
        torch.manual_seed(0)
        module = ready(
            CoTeachingPlus(
                **SMALL, noise_rate=0.4, num_gradual=0, warmup_epochs=0, released_double_softmax=double, released_scale=scale,
                released_lost_sample=lost,
            ),
            1,
        )  # fmt: skip
        given = batch(12)._replace(index=torch.arange(12))
        spread = given.images * torch.linspace(0, 2, 12).view(-1, 1, 1, 1)
        given = given._replace(images=spread[torch.arange(12) * 5 % 12])
        for network, seed in ((module.network, 1), (module.network2, 2)):
            separate(network, given.images, seed)
        loss = module.training_step(given, 0)
        found = [predictions(network, given.images) for network in (module.network, module.network2)]
        differing = [i for i in range(12) if found[0][i].index(max(found[0][i])) != found[1][i].index(max(found[1][i]))]
        assert 3 < len(differing) < 12
        assert 0 in differing
        differing = differing[:-1] if lost else differing
        scored = [[softmax(p) if double else p for p in rows] for rows in found]
        losses = [[-math.log(p[int(y)]) for p, y in zip(rows, given.labels, strict=True)] for rows in scored]
        kept = int(0.6 * len(differing) + 1e-6)
        chosen = [sorted(differing, key=losses[k].__getitem__)[:kept] for k in (0, 1)]
        expected = sum(sum(losses[k][i] for i in chosen[1 - k]) / kept for k in (0, 1))
        assert float(loss.detach()) == pytest.approx(expected / (kept if scale else 1), rel=1e-4)

    def test_networks_that_agree_learn_from_the_whole_batch(self):
        module = ready(CoTeachingPlus(**SMALL, noise_rate=0.5, warmup_epochs=0), 1)
        module.network2.load_state_dict(module.network.state_dict())
        given = batch()
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, 2 * F.cross_entropy(module.network(given.images), given.labels))

    def test_the_first_stage_is_co_teaching(self):
        given, found = batch(), []
        for kind in (CoTeaching, CoTeachingPlus):
            torch.manual_seed(0)
            found.append(
                ready(kind(**SMALL, noise_rate=0.5, num_gradual=0, warmup_epochs=2), 1).training_step(given, 0)
            )
        torch.testing.assert_close(*found)


def losses_of_two_groups(count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(count, generator=generator).pow(2) * 0.8
    high = 2.0 + torch.randn(count // 2, generator=generator) * 0.3
    return torch.cat([low, high])


class TestBetaMixture:
    def test_it_separates_two_groups(self):
        losses = losses_of_two_groups()
        wrong = beta_mixture_posterior(fit_beta_mixture(losses), losses)
        assert float(wrong[:4000].mean()) < 0.05 < 0.95 < float(wrong[4000:].mean())

    def test_it_is_the_fit_of_the_paper(self):
        """Expectation maximization with weighted moments, one loss at a time."""
        losses = losses_of_two_groups(60)
        ordered = sorted(losses.double().tolist())

        def percentile(q):
            place = q * (len(ordered) - 1)
            low = int(place)
            return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

        low, high = percentile(0.05), percentile(0.95)
        values = [loss for loss in losses.double().tolist() if low <= loss <= high]
        scaled = []
        for loss in values:
            x = (loss - low - 1e-5) / (high - low - 1e-5 + 1e-6)
            x = 1 - 1e-3 if x >= 1 else 1e-3 if x <= 0 else x
            scaled.append(min(max(x, 1e-4), 1 - 1e-4))
        a, b, w = [1.0, 2.0], [2.0, 1.0], [0.5, 0.5]

        def joint(x, k):
            gamma = math.lgamma(a[k] + b[k]) - math.lgamma(a[k]) - math.lgamma(b[k])
            return w[k] * math.exp((a[k] - 1) * math.log(x) + (b[k] - 1) * math.log(1 - x) + gamma)

        for _ in range(10):
            both = [[max(joint(x, k), 1e-12) for k in (0, 1)] for x in scaled]
            share = [[part / sum(pair) for part in pair] for pair in both]
            for k in (0, 1):
                total = sum(pair[k] for pair in share)
                mean = sum(pair[k] * x for pair, x in zip(share, scaled, strict=True)) / total
                variance = sum(pair[k] * (x - mean) ** 2 for pair, x in zip(share, scaled, strict=True)) / total
                a[k] = mean * (mean * (1 - mean) / variance - 1)
                b[k] = a[k] * (1 - mean) / mean
                w[k] = total / len(scaled)
        found = fit_beta_mixture(losses)
        assert found.means.tolist() == pytest.approx([a[k] / (a[k] + b[k]) for k in (0, 1)], rel=1e-5)
        table = [joint(x, 1) / (joint(x, 0) + joint(x, 1) + 1e-12) for x in (i / 99 or 1e-12 for i in range(99))]
        last = max(range(99), key=table.__getitem__)
        table[last:] = [table[last]] * (99 - last)
        assert found.table[:99].tolist() == pytest.approx(table, rel=1e-4, abs=1e-9)

    def test_the_posterior_does_not_decrease_after_its_maximum(self):
        generator = torch.Generator().manual_seed(0)  # the second component is narrow: it ends before the first one
        spread, narrow = torch.rand(700, generator=generator) ** 2, 0.7 + 0.04 * torch.randn(300, generator=generator)
        found = fit_beta_mixture(torch.cat([spread, narrow]))
        largest = int(found.table.argmax())
        assert largest < 90
        assert bool((found.table[largest:] == found.table[largest]).all())

    @pytest.mark.parametrize("losses", [torch.zeros(0), torch.ones(1), torch.ones(50), torch.tensor([0.0, 1.0])])
    def test_without_two_components_no_label_is_wrong(self, losses):
        wrong = beta_mixture_posterior(fit_beta_mixture(losses), torch.tensor([0.0, 0.5, 5.0]))
        assert wrong.tolist() == [0.0, 0.0, 0.0]


class TestMCorrection:
    def module(self, epoch=1, **options) -> MCorrection:
        torch.manual_seed(0)
        module = ready(MCorrection(**{**SMALL, "warmup_epochs": 1, **options}), epoch)
        module.mixture = fit_beta_mixture(losses_of_two_groups() * 2)
        return module

    def posterior(self, module, given) -> list[float]:
        losses = torch.tensor(
            [-math.log(p[int(y)]) for p, y in zip(predictions(module.network, given.images), given.labels, strict=True)]
        )
        return beta_mixture_posterior(module.mixture, losses).clamp(1e-4, 1 - 1e-4).tolist()

    def regularization(self, rows) -> float:
        mean = [sum(p[c] for p in rows) / len(rows) for c in range(C)]
        return sum(math.log(1 / C / m) / C for m in mean)

    def test_the_loss_of_hard_bootstrapping(self):
        """Eq. 11 of Arazo et al., one sample at a time."""
        module, given = self.module(alpha=3.0), batch()
        loss = module.training_step(given, 0)
        mixed = mixup(given.images, F.one_hot(given.labels, C).float(), module.stream("mixup"), 3.0, larger_half=False)
        wrong, plain = self.posterior(module, given), predictions(module.network, given.images)
        assert 0.01 < min(wrong) < 0.99
        rows, total = predictions(module.network, mixed.images), 0.0
        for i, p in enumerate(rows):
            for k, weight in ((i, mixed.lam), (int(mixed.partners[i]), 1 - mixed.lam)):
                guess = plain[k].index(max(plain[k]))
                total -= (
                    weight * ((1 - wrong[k]) * math.log(p[int(given.labels[k])]) + wrong[k] * math.log(p[guess])) / 6
                )
        assert float(loss.detach()) == pytest.approx(total + self.regularization(rows), rel=1e-4)

    def test_the_loss_of_soft_to_hard_bootstrapping(self):
        """Eq. 12 and 13 with the weights of the code, one sample at a time."""
        module, given = self.module(epoch=4, bootstrap="soft_to_hard", guided_epochs=1, temperature_epochs=5), batch()
        temperature = 1 - 0.999 * 2 / 4  # in the third of five epochs after the guided one
        loss = module.training_step(given, 0)
        wrong, plain = self.posterior(module, given), predictions(module.network, given.images)
        quality = 1 - torch.tensor(wrong)
        mixed = guided_mixup(given.images, torch.zeros(6, C), quality, module.stream("mixup", 1))
        for i in range(6):
            j = int(mixed.partners[i])
            own = (1 - wrong[i]) / (2 - wrong[i] - wrong[j])
            torch.testing.assert_close(mixed.images[i], own * given.images[i] + (1 - own) * given.images[j])
        rows, total = predictions(module.network, mixed.images), 0.0
        for i, p in enumerate(rows):
            for k in (i, int(mixed.partners[i])):
                guess = softmax([math.log(v) / temperature for v in plain[k]])
                total -= 0.5 * (1 - wrong[k]) * math.log(p[int(given.labels[k])]) / 6
                total -= 0.5 * wrong[k] * sum(g * math.log(v) for g, v in zip(guess, p, strict=True)) / 6
        assert float(loss.detach()) == pytest.approx(total + self.regularization(rows), rel=1e-4)

    def test_with_no_label_wrong_it_is_mixup_up_to_the_clipping(self):
        module, given = self.module(regularization=0.0), batch()
        module.mixture = module.mixture._replace(table=torch.zeros(100, dtype=torch.float64))
        found = module.training_step(given, 0)
        mixed = mixup(given.images, F.one_hot(given.labels, C).float(), module.stream("mixup"), 32.0, larger_half=False)
        torch.testing.assert_close(
            found, F.cross_entropy(module.network(mixed.images), mixed.targets), rtol=1e-3, atol=1e-3
        )

    @pytest.mark.parametrize("batch_statistics", [True, False])
    def test_predictions_use_and_update_batch_statistics_unless_switched_off(self, batch_statistics):
        """Every label counts as wrong and nothing is mixed, so the loss is that of the predicted classes."""
        module, given = self.module(regularization=0.0, alpha=0.0, batch_statistics=batch_statistics), batch()
        module.mixture = module.mixture._replace(table=torch.ones(100, dtype=torch.float64))
        network = module.network.train()
        for norm in (part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_()  # other classes are predicted with them
        twin = copy.deepcopy(network)
        guesses = {False: twin.eval()(given.images).argmax(1), True: twin.train()(given.images).argmax(1)}
        assert not torch.equal(guesses[False], guesses[True])
        if not batch_statistics:
            twin = copy.deepcopy(network)
        expected = F.cross_entropy(twin(given.images), guesses[batch_statistics])
        torch.testing.assert_close(module.training_step(given, 0), expected, rtol=1e-3, atol=1e-3)
        for name, value in twin.named_buffers():
            torch.testing.assert_close(network.get_buffer(name), value)

    def test_stages(self):
        assert [stage.name for stage in MCorrection(**SMALL).stages()] == ["warmup", "bootstrap"]
        dynamic = MCorrection(**SMALL, bootstrap="soft_to_hard").stages()
        assert [(stage.name, stage.epochs) for stage in dynamic] == [
            ("warmup", 105),
            ("guided", 5),
            ("bootstrap", None),
        ]

    def test_guided_mixup_keeps_the_given_labels(self):
        module, given = self.module(bootstrap="soft_to_hard", guided_epochs=1, alpha=3.0), batch()
        loss = module.training_step(given, 0)
        lam = mixup(torch.zeros(0, C), torch.zeros(0, C), module.stream("mixup"), 3.0, larger_half=False).lam
        quality = 1 - torch.tensor(self.posterior(module, given))
        mixed = guided_mixup(given.images, F.one_hot(given.labels, C).float(), quality, module.stream("mixup", 1), lam)
        rows, total = predictions(module.network, mixed.images), 0.0
        for i, p in enumerate(rows):
            own, other = int(given.labels[i]), int(given.labels[mixed.partners[i]])
            total -= (lam * math.log(p[own]) + (1 - lam) * math.log(p[other])) / 6
        assert float(loss.detach()) == pytest.approx(total, rel=1e-4)

    def test_masks_follow_the_posterior(self):
        module, given = self.module(sanm=SANM(mu=0.5, seed=0)), batch()
        seen, forward = [], module.sanm.forward
        module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
        module.training_step(given, 0)
        torch.testing.assert_close(
            seen[0].ratio, 0.5 * torch.tensor(self.posterior(module, given)), rtol=1e-4, atol=1e-4
        )

    def test_the_losses_of_an_epoch_give_the_quality_of_each_label(self):
        module = self.module()
        module.begin_epoch()
        losses = module.predict_train("loss")["loss"]
        torch.testing.assert_close(module.label_quality(), 1 - beta_mixture_posterior(fit_beta_mixture(losses), losses))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CoTeachingPlus(**SMALL), r"expected noise_rate in \[0, 1\), got None"),
        (lambda: MCorrection(**SMALL, bootstrap="soft"), "expected bootstrap 'hard' or 'soft_to_hard', got 'soft'"),
        (lambda: MCorrection(**SMALL, alpha=-1.0), "expected alpha >= 0, got -1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("options", [{"regions": "peak_and_trough"}, {"keep_unmasked": True}], ids=str)
def test_co_teaching_plus_selects_samples_for_all_their_views(options):
    torch.manual_seed(0)
    sanm = SANM(mu=0.5, ratio="fixed", seed=0, **options)
    module = ready(CoTeachingPlus(**SMALL, noise_rate=0.4, warmup_epochs=0, sanm=sanm), 1)
    loss = module.training_step(batch(12)._replace(index=torch.arange(12)), 0)
    assert bool(torch.isfinite(loss))
    loss.backward()
