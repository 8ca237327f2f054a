"""Steps of the methods that mix, and schedules, against loops over samples and classes written from the papers."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from sanm_lightning import NoisyBatch
from sanm_lightning.functional import Mixed
from sanm_lightning.methods import SSR, DivideMix, ELRPlus, LinearAfter
from tests.methods.recorded import Data
from tests.methods.toy import trainer

C, HALF = 4, 3
SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": C, "image_size": (16, 16)}
PARTNERS, LAM = torch.tensor([5, 3, 0, 1, 4, 2]), 0.7


def ready(module, epoch=0):
    module.eval()  # batch norm by running statistics: a sample's logits are its own
    run = trainer(1)
    run.datamodule = Data()
    module.trainer = run
    run.fit_loop.epoch_progress.current.processed = epoch
    return module


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def logits_of(network, image: Tensor) -> list[float]:
    with torch.no_grad():
        return network(image[None])[0].double().tolist()


def fixed_mix(images: Tensor, targets: Tensor, **_) -> Mixed:
    """Mix each row with a fixed partner of its own view."""
    partners = torch.cat([PARTNERS[: len(images)] + first for first in range(0, len(images), len(PARTNERS))])
    mixed = Mixed(images, targets, LAM, partners[: len(images)])
    return mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


def blend(one: list[float], other: list[float]) -> list[float]:
    return [LAM * a + (1 - LAM) * b for a, b in zip(one, other, strict=True)]


def rows(size: int) -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.rand(size, 3, 16, 16, generator=generator) for _ in range(2))
    return NoisyBatch(views[0], torch.arange(size) % C, torch.arange(size) + 4, None, views)


def test_mixmatch_of_dividemix():
    """Algorithm 1 of Li et al., lines 10 to 26, for network 2, one sample and one class at a time."""
    torch.manual_seed(0)
    module = ready(DivideMix(**SMALL, warmup_epochs=0, temperature=0.5))
    module.division.reset(20)
    module.division.clean = torch.rand(20, 2)
    batch = rows(2 * HALF)
    loss = module.mixmatch(batch, 1, fixed_mix, 7.0)
    own, other = module.network2, module.network
    targets = []
    for i in range(2 * HALF):
        mine = [softmax(logits_of(own, view[i])) for view in batch.views]
        theirs = [softmax(logits_of(other, view[i])) for view in batch.views]
        if i < HALF:  # co-refinement of the given label
            w = float(module.division.clean[batch.index[i], 0])
            mean = [sum(p[c] for p in mine) / 2 for c in range(C)]
            guess = [w * (c == int(batch.labels[i])) + (1 - w) * mean[c] for c in range(C)]
        else:  # co-guessing by both networks
            guess = [sum(p[c] for p in mine + theirs) / 4 for c in range(C)]
        powers = [value ** (1 / 0.5) for value in guess]
        targets.append([power / sum(powers) for power in powers])
    cross_entropy, squares, means = [], [], [0.0] * C
    for view in batch.views:
        for i in range(2 * HALF):
            j = int(PARTNERS[i])
            target = blend(targets[i], targets[j])
            p = softmax(logits_of(own, LAM * view[i] + (1 - LAM) * view[j]))
            means = [m + v / (4 * HALF) for m, v in zip(means, p, strict=True)]
            if i < HALF:
                cross_entropy.append(-sum(t * math.log(v) for t, v in zip(target, p, strict=True)))
            else:
                squares.append(sum((v - t) ** 2 for t, v in zip(target, p, strict=True)) / C)
    penalty = sum(1 / C * math.log(1 / C / m) for m in means)
    expected = sum(cross_entropy) / len(cross_entropy) + 7.0 * sum(squares) / len(squares) + penalty
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_ssr_on_selected_samples():
    torch.manual_seed(0)
    module = ready(SSR(**SMALL, k=2, lambda_fc=0.0))
    module.selection.reset(20, torch.arange(20) % C)
    module.selection.update(labels=(torch.arange(20) + 1) % C)
    batch = rows(6)
    module.stream = lambda *_, **__: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sanm_lightning.methods.ssr.mixup", fixed_mix)
        loss = module.mixed_cross_entropy(batch)
    total = 0.0
    for view in batch.views:
        for i in range(6):
            j = int(PARTNERS[i])
            p = softmax(logits_of(module.network, LAM * view[i] + (1 - LAM) * view[j]))
            a, b = (int(batch.index[k] + 1) % C for k in (i, j))  # the labels of the selection, not the given ones
            total -= LAM * math.log(p[a]) + (1 - LAM) * math.log(p[b])
    assert float(loss.detach()) == pytest.approx(total / 12, rel=1e-4)


@pytest.mark.parametrize("product", [False, True])
def test_a_step_of_elr_plus_with_mixup(product):
    torch.manual_seed(0)
    module = ready(ELRPlus(**SMALL, momentum=0.6, weight=2.0, target_product=product))
    for bank in module.banks:
        bank.reset(20)
        bank.value = torch.rand(20, C).softmax(1)
    before = [bank.value.clone() for bank in module.banks]
    batch = rows(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sanm_lightning.methods.elr_plus.mixup", fixed_mix)
        loss = module.training_step(batch, 0)
    total = 0.0
    for number, network in enumerate(module.networks):
        teacher = module.teachers[1 - number].module
        kept = []
        for i, row in enumerate(batch.index.tolist()):
            now = softmax(logits_of(teacher, batch.images[i]))
            kept.append([0.6 * old + 0.4 * new for old, new in zip(before[number][row].tolist(), now, strict=True)])
            assert module.banks[number].value[row].tolist() == pytest.approx(kept[-1], rel=1e-4)
        for i in range(6):
            j = int(PARTNERS[i])
            p = softmax(logits_of(network, LAM * batch.images[i] + (1 - LAM) * batch.images[j]))
            label = [LAM * (c == i % C) + (1 - LAM) * (c == j % C) for c in range(C)]
            goal = blend(kept[i], kept[j])
            if product:
                raw = [a * b for a, b in zip(label, goal, strict=True)]
                label = [value / sum(raw) for value in raw]
            total -= sum(t * math.log(v) for t, v in zip(label, p, strict=True)) / 6
            clamped = [min(max(v, 1e-4), 1 - 1e-4) for v in p]
            total += 2.0 * math.log(1 - sum(a * b for a, b in zip(clamped, goal, strict=True))) / 6
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


class TestLinearAfter:
    def rates(self, total: int, start: float, late: float | None = None) -> list[tuple[float, float]]:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = LinearAfter(optimizer, total_steps=total, start=start, late_beta1=late)
        seen = []
        for _ in range(total):
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
            optimizer.step()
            schedule.step()
        return seen

    @pytest.mark.parametrize(("total", "start"), [(10, 0.4), (7, 0.0), (200, 0.4)])
    def test_is_constant_and_then_a_line_to_zero(self, total, start):
        first = start * total
        expected = [0.5 if step <= first else 0.5 * (total - step) / (total - first) for step in range(total)]
        assert [rate for rate, _ in self.rates(total, start)] == pytest.approx(expected)

    def test_lowers_the_first_momentum_from_the_decay_on(self):
        betas = [beta for _, beta in self.rates(10, 0.4, late=0.1)]
        assert betas == [0.9] * 4 + [0.1] * 6
        assert [beta for _, beta in self.rates(10, 0.4)] == [0.9] * 10

    def test_takes_its_length_from_the_trainer(self):
        from sanm_lightning.methods import CrossEntropy
        from tests.methods.toy import data

        module = CrossEntropy(**SMALL, scheduler=partial(LinearAfter, start=0.5))
        run = trainer(2)
        run.fit(module, data())
        assert module.schedule_steps == 8
        assert run.optimizers[0].param_groups[0]["lr"] == 0

    @pytest.mark.parametrize("start", [-0.1, 1.0])
    def test_refuses_a_start_outside_the_training(self, start):
        with pytest.raises(ValueError, match=r"expected start in \[0, 1\), got"):
            self.rates(4, start)
