"""ELR and ELR+: memory, regularisation, ramps and teachers against slow loops."""

import math
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM, CrossEntropy, NoisyBatch
from sanm_lightning.functional import clamped_probs, early_learning_regularization, ema_decay, sigmoid_ramp
from sanm_lightning.methods import ELR, ELRPlus
from tests.methods.toy import data, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(kind=ELR, **options):
    torch.manual_seed(0)
    return kind(**{**SMALL, "warmup_epochs": 1, **options})


def test_the_term_against_a_loop_and_its_gradient_goes_to_the_prediction_only():
    torch.manual_seed(1)
    p = torch.rand(5, 3).softmax(1).requires_grad_()
    t = torch.rand(5, 3).softmax(1).requires_grad_()
    term = early_learning_regularization(p, t)
    logs = [
        math.log(1 - sum(a * b for a, b in zip(r, s, strict=True))) for r, s in zip(p.tolist(), t.tolist(), strict=True)
    ]
    assert float(term.detach()) == pytest.approx(sum(logs) / 5, rel=1e-5)
    term.backward()
    assert p.grad is not None
    assert t.grad is None


def test_the_term_stays_finite_on_a_sure_prediction():
    sure = clamped_probs(torch.tensor([[100.0, 0.0, 0.0]]))
    assert math.isfinite(float(early_learning_regularization(sure, torch.tensor([[1.0, 0.0, 0.0]]))))


def test_a_step_against_the_formulas():
    module = method(momentum=0.6, weight=2.0)
    module.targets.reset(20)
    module.targets.value.copy_(torch.rand(20, 4).softmax(1))
    before = module.targets.value.clone()
    module.trainer = trainer(1)
    module.eval()
    batch = NoisyBatch(torch.rand(3, 3, 16, 16), torch.tensor([0, 3, 1]), torch.tensor([7, 2, 19]))
    loss = module.training_step(batch, 0)
    logits = module.network(batch.images).detach()
    total = 0.0
    for i, row in enumerate(batch.index.tolist()):
        p = [min(max(v, 1e-4), 1 - 1e-4) for v in logits[i].softmax(0).tolist()]
        t = [0.6 * old + 0.4 * now / sum(p) for old, now in zip(before[row].tolist(), p, strict=True)]
        assert module.targets.value[row].tolist() == pytest.approx(t, rel=1e-5)
        entropy = float(F.cross_entropy(logits[i : i + 1], batch.labels[i : i + 1]))
        total += entropy + 2.0 * math.log(1 - sum(a * b for a, b in zip(t, p, strict=True)))
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-4)


def test_with_weight_zero_it_is_cross_entropy_bit_for_bit():
    plain, elr = method(CrossEntropy), method(weight=0.0)
    trainer(2).fit(plain, data())
    trainer(2).fit(elr, data())
    assert same(plain.network, elr.network)


def test_the_memory_is_of_unmasked_images():
    module = method(sanm=SANM(mu=0.9, quality="oracle", seed=0), warmup_epochs=0, momentum=0.0)
    seen, update = [], module.targets.update
    module.targets.update = lambda index, p: seen.append(p) or update(index, p)
    views = []
    forward = module.sanm.forward
    module.sanm.forward = lambda *args: views.append(forward(*args)) or views[-1]
    trainer(1).fit(module, data())
    for written, view in zip(seen, views, strict=True):
        p = clamped_probs(view.logits)
        torch.testing.assert_close(written, p / p.sum(1, keepdim=True))


def test_a_loader_without_indices_is_refused_before_training():
    pairs = torch.utils.data.TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 4)
    with pytest.raises(ValueError, match="expected a data module with num_samples for ELR"):
        trainer(1).fit(method(), torch.utils.data.DataLoader(pairs, 4))


class Sample(NamedTuple):
    image: torch.Tensor
    label: int
    index: int


@pytest.mark.parametrize("form", [tuple, lambda parts: Sample(*parts), lambda parts: Sample(*parts)._asdict()])
def test_a_data_set_with_an_index_returns_named_fields(form):
    class Samples(L.LightningDataModule):
        num_samples = 8

        def train_dataloader(self):
            samples = [form((torch.rand(3, 16, 16), number % 4, number)) for number in range(8)]
            return torch.utils.data.DataLoader(samples, 4)

    module = method()
    if form is tuple:
        sentence = "for ELR, .* or return named tuples with the fields image, label and index from the data set"
        with pytest.raises(ValueError, match=sentence):
            trainer(1).fit(module, Samples())
        return
    trainer(1).fit(module, Samples())
    assert bool(module.targets.value.any(1).all())


def test_the_ramp_of_the_weight_and_the_share_of_the_teacher():
    assert [sigmoid_ramp(step, 0) for step in (0, 5)] == [1, 1]
    assert sigmoid_ramp(0, 100) == pytest.approx(math.exp(-5))
    assert sigmoid_ramp(100, 100) == sigmoid_ramp(500, 100) == 1
    assert ema_decay(0, 0.997, 40000) == pytest.approx(0.997 * math.exp(-5 * (1 - 2 / 40000) ** 2))
    assert ema_decay(0, 0.997, 40000) == pytest.approx(0.0067, abs=1e-4)
    assert ema_decay(40000, 0.997, 40000) == 0.997
    assert [ema_decay(step, 0.9, None) for step in (0, 1, 2, 99)] == pytest.approx([1 / 2, 2 / 3, 3 / 4, 0.9])


def test_teachers_are_running_means_of_parameters_and_of_nothing_else():
    module = method(ELRPlus, gamma=0.8, ema_ramp_steps=None)
    expected = [{n: p.clone() for n, p in teacher.module.named_parameters()} for teacher in module.teachers]
    steps = []

    def follow(trainer, *_):
        share = min(1 - 1 / (len(steps) + 2), 0.8)
        for mean, network in zip(expected, (module.network, module.network2), strict=True):
            for name, parameter in network.named_parameters():
                mean[name] = share * mean[name] + (1 - share) * parameter.detach()
        steps.append(1)

    watcher = type("Follow", (L.Callback,), {"on_train_batch_end": lambda self, *arguments: follow(*arguments)})
    trainer(2, callbacks=[watcher()]).fit(module, data())
    assert len(steps) == 8
    for mean, teacher in zip(expected, module.teachers, strict=True):
        for name, parameter in teacher.module.named_parameters():
            torch.testing.assert_close(parameter.detach(), mean[name], rtol=1e-4, atol=1e-6)
            assert not parameter.requires_grad


def test_a_step_of_elr_plus_without_mixing_or_weight_is_cross_entropy_of_both():
    module = method(ELRPlus, alpha=0.0, weight=0.0)
    for bank in module.banks:
        bank.reset(20)
    module.trainer = trainer(1)
    module.eval()
    batch = NoisyBatch(torch.rand(3, 3, 16, 16), torch.tensor([0, 3, 1]), torch.tensor([7, 2, 19]))
    both = [F.cross_entropy(network(batch.images), batch.labels) for network in (module.network, module.network2)]
    torch.testing.assert_close(module.training_step(batch, 0), both[0] + both[1])
    for number, bank in enumerate(module.banks):  # each remembers what the other's teacher says
        says = module.teachers[1 - number](batch.images).softmax(1)
        torch.testing.assert_close(bank.value[batch.index], 0.3 * says)


def test_targets_are_multiplied_on_a_hundred_classes_unless_said():
    assert ELRPlus(**{**SMALL, "num_classes": 100}).target_product
    assert not method(ELRPlus).target_product
    assert method(ELRPlus, target_product=True).target_product


def test_multiplied_targets_stay_distributions():
    trainer(2).fit(module := method(ELRPlus, target_product=True), data())
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ELR, {"weight": -1.0}, "weight >= 0"),
        (ELR, {"momentum": 1.0}, r"decay in \[0, 1\)"),
        (ELRPlus, {"gamma": 1.0}, r"gamma in \[0, 1\)"),
        (ELRPlus, {"alpha": -1.0}, "alpha >= 0"),
        (ELRPlus, {"coef_steps": -1}, "coef_steps >= 0"),
        (ELRPlus, {"ema_ramp_steps": 0}, "ema_ramp_steps > 0 or null"),
    ],
)
def test_arguments_out_of_range(kind, options, message):
    with pytest.raises(ValueError, match=message):
        method(kind, **options)
