"""CDR: which weights are critical, and what becomes of the gradients, against slow loops."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision

from sanm_lightning import SANM, CrossEntropy
from sanm_lightning.functional import critical_fraction, critical_threshold
from sanm_lightning.methods import CDR, CoTeaching
from tests.methods.toy import data, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(kind=CDR, **options):
    torch.manual_seed(0)
    given = {"noise_rate": 0.5} if kind is CDR else {}
    return kind(**{**SMALL, "warmup_epochs": 1, **given, **options})


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_the_threshold_is_the_nth_largest_score_over_all_tensors(share):
    torch.manual_seed(2)
    weights, gradients = [torch.randn(3, 4), torch.randn(2, 3, 2, 2)], [torch.randn(3, 4), torch.randn(2, 3, 2, 2)]
    scores = sorted(
        (
            abs(float(w) * float(g))
            for ws, gs in zip(weights, gradients, strict=True)
            for w, g in zip(ws.flatten(), gs.flatten(), strict=True)
        ),
        reverse=True,
    )
    critical = max(1, int(share * 36 + 1e-6))
    assert float(critical_threshold(weights, gradients, share)) == pytest.approx(scores[critical - 1], rel=1e-6)


def test_the_schedules():
    assert [critical_fraction(epoch, 0.4, "constant", 20) for epoch in (0, 10, 30)] == pytest.approx([0.6] * 3)
    gradual = [critical_fraction(epoch, 0.4, "gradual", 5) for epoch in range(7)]
    assert gradual == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6])


def gradients_after(module, **extra):
    """Gradients before and after they are masked, on made-up ones."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.trainer = trainer(1)
    module.on_before_optimizer_step(None)
    return before, {name: parameter.grad for name, parameter in module.named_parameters()}


def test_only_critical_weights_keep_a_shrunk_gradient():
    module = method(noise_rate=0.75, sanm=SANM(seed=0))
    before, after = gradients_after(module)
    competing = {name: p for name, p in module.named_parameters() if name.startswith("network.") and p.ndim in (2, 4)}
    scores = torch.cat([(competing[name] * before[name]).abs().flatten() for name in competing])
    kept = 0
    bound = scores.sort(descending=True).values[int(0.25 * len(scores)) - 1]
    for name in before:
        if name not in competing:  # batch norm, biases, the decoder
            assert torch.equal(before[name], after[name])
            continue
        critical = (competing[name] * before[name]).abs() >= bound
        kept += int(critical.sum())
        torch.testing.assert_close(after[name], torch.where(critical, 0.25 * before[name], 0.0))
    assert kept == int(0.25 * len(scores))
    assert any(name.startswith("sanm.decoder") for name in before)


def test_without_noise_it_is_cross_entropy_bit_for_bit():
    plain, cdr = method(CrossEntropy), method(noise_rate=0.0)
    trainer(2).fit(plain, data())
    trainer(2).fit(cdr, data())
    assert same(plain.network, cdr.network)


class Observed(CDR):
    """A subclass with a hook of its own, in which it notes the gradients of every step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = []

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.steps.append([weight.grad.clone() for weight in self.competing()])


def test_accumulated_gradients_are_masked_before_they_are_clipped():
    plain, own = method(noise_rate=0.75), method(Observed, noise_rate=0.75)
    for module in (plain, own):
        trainer(1, accumulate_grad_batches=2, gradient_clip_val=0.01).fit(module, data())
    assert len(own.steps) == 2  # of four batches
    for gradients in own.steps:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        assert int((flat != 0).sum()) == int(0.25 * len(flat))
        assert float(flat.norm()) > 0.01
    assert same(plain.network, own.network)


@pytest.mark.parametrize("trial", [False, True])
def test_every_step_is_masked_once_also_in_trials_of_finders(trial, monkeypatch):
    masked = []
    plain = CDR.on_before_optimizer_step

    def note(self, optimizer):
        masked.append(self.global_step)
        plain(self, optimizer)

    monkeypatch.setattr(CDR, "on_before_optimizer_step", note)
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    run = trainer(6, callbacks=[finder] if trial else [])
    run.fit(method(noise_rate=0.75), data())
    if trial:
        tried, masked = masked[:20], masked[20:]
        assert tried == list(range(20))
    assert masked == list(range(run.global_step))


def test_decay_of_absolute_values_adds_the_sign():
    options = {"noise_rate": 0.5, "optimizer": lambda p: torch.optim.SGD(p, 0.1)}
    module, other = method(**options), method(**options, decay="l1", l1_decay=0.25)
    _, squares = gradients_after(module)
    _, absolutes = gradients_after(other)
    for name, parameter in module.named_parameters():
        sign = parameter.sign() if name.startswith("network.") and parameter.ndim > 1 else torch.zeros(())
        torch.testing.assert_close(absolutes[name], squares[name] + 0.25 * sign)


def test_two_decays_at_once_are_refused():
    with pytest.raises(ValueError, match=r"weight_decay 0 for decay: l1, got 0\.0005"):
        trainer(1).fit(method(decay="l1"), data())


@pytest.mark.parametrize(
    ("kind", "options", "limits", "purpose"),
    [
        (CDR, {"decay": "l1"}, {}, "the L1 decay is added to them"),
        (CoTeaching, {"noise_rate": 0.2, "network": "small_cnn"}, {"gradient_clip_val": 1.0}, "they are clipped"),
    ],
)
def test_gradients_that_a_fused_optimizer_unscales_in_its_step_are_refused(kind, options, limits, purpose):
    def scaled():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    plain, fused = (partial(torch.optim.SGD, lr=0.1, fused=value) for value in (False, True))
    trainer(1, plugins=[scaled()], **limits).fit(method(kind, optimizer=plain, **options), data(num_samples=16))
    with pytest.raises(
        ValueError, match=f"unscaled before {purpose}, got a fused SGD with precision 16-mixed; set fused"
    ):
        trainer(1, plugins=[scaled()], **limits).fit(method(kind, optimizer=fused, **options), data(num_samples=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_rate": None}, r"noise_rate in \[0, 1\), got None; set noise_rate"),
        ({"noise_rate": 1.0}, r"noise_rate in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "schedule 'constant' or 'gradual'"),
        ({"decay": "l3"}, "decay 'l1' or 'l2'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
