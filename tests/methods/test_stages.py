"""Stages: which epoch belongs to which, what a stage resets, freezes and sets, and that a resume loses none of it."""

import contextlib
from itertools import pairwise

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from sanm_lightning import SANM
from sanm_lightning.callbacks import Stage
from sanm_lightning.callbacks.stages import locate, repeated_stages, stage_epochs
from sanm_lightning.methods import CrossEntropy, DivideMix, ELRPlus
from tests.methods.renewing import Renewing, falling
from tests.methods.test_every_method import AtStep
from tests.methods.toy import data, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}
lengths = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def module(kind=Renewing, **options):
    torch.manual_seed(0)
    return kind(**{**SMALL, "warmup_epochs": 1, **options})


def test_every_run_after_the_first_starts_from_new_networks_and_the_last_has_no_end():
    found = repeated_stages([Stage("one", 2, lr=0.5), Stage("two", 3)], 3)
    assert [stage.name for stage in found] == ["one", "two", "one_2", "two_2", "one_3", "two_3"]
    assert [stage.epochs for stage in found] == [2, 3, 2, 3, 2, None]
    assert [stage.reset for stage in found] == ["none", "none", "network", "none", "network", "none"]
    assert [stage.lr for stage in found] == [0.5, None] * 3
    assert repeated_stages([Stage("one", 2)], 1) == [Stage("one")]


@given(lengths, st.integers(0, 20), st.booleans())
def test_an_epoch_belongs_to_the_stage_that_counting_gives(epochs, epoch, open_end):
    stages = [Stage(str(number), length) for number, length in enumerate(epochs)]
    if open_end:
        stages[-1] = Stage(stages[-1].name, None)
    counted = [name for stage in stages for name in [stage.name] * (50 if stage.epochs is None else stage.epochs)]
    expected = counted[epoch] if epoch < len(counted) else stages[-1].name
    number, stage, first = locate(stages, epoch)
    assert stage.name == expected == stages[number].name
    assert first == sum(length for length in epochs[:number])
    ran = stage_epochs(stages, epoch)
    assert ran == {s.name: sum(locate(stages, e)[1].name == s.name for e in range(epoch)) for s in stages}


class Watch(L.Callback):
    """Note weights and rates around the steps."""

    def __init__(self):
        self.at_start, self.used, self.momentum = {}, [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.at_start[trainer.current_epoch] = pl_module.network.network.fc.weight.detach().clone()
            self.momentum[trainer.current_epoch] = len(trainer.optimizers[0].state)

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.used.append(
                (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"])
            )
        )


def test_a_stage_begins_with_fresh_weights_and_an_optimizer_that_has_forgotten():
    kept, watch = module(CrossEntropy), Watch()
    trainer(1).fit(kept, data())
    renewed, resets = module(), []
    reset = renewed.reset
    renewed.reset = lambda **options: resets.append(renewed.current_epoch) or reset(**options)
    trainer(3, callbacks=[watch]).fit(renewed, data())
    assert resets == [1], "once, before the first step of the stage"
    end_of_first = kept.network.network.fc.weight
    assert not torch.allclose(watch.at_start[1], end_of_first, atol=1e-3)
    assert watch.momentum[0] == 0
    assert watch.momentum[1] == 0, "momentum of the first stage is left"
    assert watch.momentum[2] > 0


class Twice(torch.optim.SGD):
    """Calls the step of its base class, whose hooks are its own."""

    def step(self, closure=None):
        return super().step(closure)


def test_the_rate_of_a_stage_holds_with_an_optimizer_that_calls_the_step_of_its_base_class():
    fitted = []
    for kind in (torch.optim.SGD, Twice):
        renewed = module()
        create = {"configure_optimizers": lambda self, kind=kind: kind(self.parameters(), lr=0.02, weight_decay=1e-3)}
        renewed.__class__ = type("Renewing", (Renewing,), create)
        trainer(3).fit(renewed, data())
        assert renewed.optimizers().param_groups[0]["lr"] == 0.02
        fitted.append(renewed)
    assert same(fitted[0].network, fitted[1].network)


def test_the_draw_is_that_of_a_new_network_and_the_same_for_every_run():
    weights = []
    for _ in range(2):
        watch = Watch()
        trainer(2, callbacks=[watch]).fit(module(), data())
        torch.rand(7)
        weights.append(watch.at_start[1])
    assert torch.equal(*weights)
    bound = module().network.network.fc.weight.abs().max()
    assert 0.5 * bound < weights[0].abs().max() < 2 * bound


def test_a_stage_sets_rate_and_decay_of_its_own_steps_only():
    watch, run = Watch(), None
    run = trainer(3, callbacks=[watch])
    run.fit(module(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)), data())
    rates = [rate for rate, _ in watch.used]
    assert rates[:4] == [0.02] * 4
    assert rates[4:] == pytest.approx([0.05 * falling(step, 8) for step in range(8)])
    assert [decay for _, decay in watch.used] == [5e-4] * 4 + [0.0] * 8
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**3)  # the schedule went on undisturbed


def stage_rates(epochs, batch_size, path=None, **options):
    """Rates of the steps of a fit by ``Renewing``, without those of its first stage, relative to that of the second stage."""
    watch = Watch()
    run = trainer(epochs, **{**options, "callbacks": [watch, *options.get("callbacks", [])]})
    run.fit(module(), data(batch_size=batch_size), ckpt_path=path)
    return run, [rate / 0.05 for rate, _ in watch.used if rate != 0.02]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("batch_size", [8, 32])
def test_the_rate_of_a_stage_follows_its_epochs_in_a_run_resumed_with_another_batch_size(tmp_path, epochs, batch_size):
    with contextlib.nullcontext() if epochs > 1 else pytest.warns(UserWarning, match="that reach the stage 'second'"):
        run, _ = stage_rates(epochs, 16)
    run.save_checkpoint(tmp_path / "end.ckpt")
    _, rates = stage_rates(4, batch_size, tmp_path / "end.ckpt")
    steps = 64 // batch_size
    assert rates == pytest.approx([falling(step, 3 * steps) for step in range((epochs - 1) * steps, 3 * steps)])


def test_the_rate_of_a_stage_follows_its_epochs_with_a_schedule_of_accumulation():
    _, rates = stage_rates(3, 16, callbacks=[GradientAccumulationScheduler({0: 1, 2: 2})])
    assert rates == pytest.approx([falling(step, 8) for step in range(4)] + [falling(step, 4) for step in range(2, 4)])


def test_the_rate_of_the_last_stage_ends_with_max_steps():
    _, rates = stage_rates(-1, 16, max_steps=8)
    assert rates == pytest.approx([falling(step, 4) for step in range(4)])
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})  # 4 steps, then 2 per epoch
    _, rates = stage_rates(-1, 16, max_steps=10, callbacks=[accumulation])
    assert rates == pytest.approx([falling(step, 6) for step in range(6)])


class Endless(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return ((torch.rand(3, 16, 16), number % 4) for number in range(24))


class Falling(CrossEntropy):
    def stages(self):
        return [Stage("fall", factor=falling)]


def test_a_rate_over_a_stage_requires_a_number_of_batches():
    with pytest.raises(
        ValueError,
        match="expected a training set with a length for the stage 'fall' of Falling, whose learning rate depends on the "
        "number of its steps, got one without; set limit_train_batches to the number of batches of an epoch",
    ):
        trainer(2).fit(module(Falling), DataLoader(Endless(), 8))

    class Later(CrossEntropy):
        def stages(self):
            return [Stage("plain", 2), Stage("fall", factor=falling)]

    with pytest.warns(UserWarning, match="expected max_epochs that reach the stage 'fall' of Later"):
        trainer(2, max_steps=3).fit(module(Later), DataLoader(Endless(), 8))
    watch = Watch()
    trainer(2, limit_train_batches=2, callbacks=[watch]).fit(module(Falling), DataLoader(Endless(), 8))
    assert [rate for rate, _ in watch.used] == pytest.approx([0.02 * falling(step, 4) for step in range(4)])


class Freezing(CrossEntropy):
    """The classifier rests in the second stage."""

    def stages(self):
        return [Stage("first", 1), Stage("second", None, frozen=("network.network.fc",))]


def test_frozen_parameters_neither_move_nor_decay_and_move_again_in_no_other_stage():
    watch, frozen = Watch(), module(Freezing)
    trainer(3, callbacks=[watch]).fit(frozen, data())
    assert not torch.equal(watch.at_start[0], watch.at_start[1])
    assert torch.equal(watch.at_start[1], frozen.network.network.fc.weight)
    plain = module(CrossEntropy)
    trainer(3).fit(plain, data())
    assert not torch.equal(plain.network.network.layers[0].weight, frozen.network.network.layers[0].weight)


class Probing(CrossEntropy):
    """Only the classifier is trained in the second stage."""

    def stages(self):
        return [Stage("first", 1), Stage("second", 1, trained="head"), Stage("third")]


def test_a_stage_that_trains_the_head_neither_moves_nor_decays_another_parameter():
    probing = module(Probing, sanm=SANM(mu=0.5, beta=0.02, seed=0))
    weights = []

    class Note(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    trainer(3, callbacks=[Note()]).fit(probing, data())
    head, every = (
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in pairwise(weights)
    )
    assert head == {"network.network.fc.weight", "network.network.fc.bias"}
    assert every == set(weights[0])


class HeadOnly(CrossEntropy):
    def stages(self):
        return [Stage("first", 1), Stage("second", None, reset="head")]


def test_a_reset_of_the_head_leaves_the_backbone():
    seen = {}

    class Compare(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                seen["end"] = {key: value.clone() for key, value in pl_module.network.state_dict().items()}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 0):
                seen["start"] = {key: value.clone() for key, value in pl_module.network.state_dict().items()}

    trainer(2, callbacks=[Compare()]).fit(module(HeadOnly), data())
    changed = {key for key in seen["end"] if not torch.equal(seen["end"][key], seen["start"][key])}
    assert changed == {"network.fc.weight", "network.fc.bias"}


class RenewingPlus(ELRPlus):
    def stages(self):
        return [Stage("first", 1), Stage("second", None, reset="network")]


def test_a_reset_covers_both_networks_their_decoders_and_their_averaged_copies():
    plus, seen = module(RenewingPlus, sanm=SANM(seed=0)), {}

    class Compare(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen[trainer.current_epoch] = {k: v.detach().clone() for k, v in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 5:
                for teacher, network in zip(pl_module.teachers, pl_module.networks, strict=True):
                    for slow, fast in zip(teacher.module.parameters(), network.parameters(), strict=True):
                        assert torch.equal(slow, fast), "the first update after a reset copies"

    trainer(2, callbacks=[Compare()]).fit(plus, data())
    for key in seen[0]:
        if "teachers" not in key and "weight" in key:
            assert not torch.allclose(seen[0][key], seen[1][key], atol=1e-4) or seen[0][key].eq(1).all(), key


@pytest.mark.parametrize("sanm", [None, {"mu": 0.5, "seed": 0}], ids=["alone", "sanm"])
@pytest.mark.parametrize("step", [3, 4, 5, 6, 8])  # before the reset, at the last step before it, after it
def test_a_run_with_a_reset_resumes_bit_for_bit(tmp_path, sanm, step):
    def make():
        return module(sanm=None if sanm is None else SANM(**sanm))

    whole, resumed, path = make(), make(), str(tmp_path / "middle.ckpt")
    trainer(3, callbacks=[AtStep(step, path)]).fit(whole, data())
    torch.manual_seed(77)
    trainer(3).fit(resumed, data(), ckpt_path=path)
    assert same(whole.network, resumed.network)


def test_a_run_that_ends_in_its_warm_up_is_refused_and_a_late_stage_is_warned_of():
    with pytest.raises(ValueError, match="expected max_epochs above the 5 epochs of the stage 'warmup', got 2"):
        trainer(2).fit(module(DivideMix, warmup_epochs=5), data())

    class Three(CrossEntropy):
        def stages(self):
            return [Stage("one", 1), Stage("two", 1), Stage("three", 1)]

    for epochs, late in ((1, "two|three"), (2, "three")):
        with pytest.warns(
            UserWarning, match=f"expected max_epochs that reach the stage '({late})' of .*, got {epochs}"
        ):
            trainer(epochs).fit(module(Three), data())
    for steps, late in ((4, "two|three"), (8, "three")):
        with pytest.warns(
            UserWarning, match=f"expected max_steps that reach the stage '({late})' of Three, got {steps};"
        ):
            trainer(3, max_steps=steps).fit(module(Three), data())
    trainer(3, max_steps=9).fit(module(Three), data())


def test_the_first_stage_clips_to_its_own_norm():
    norms = []

    class Measure(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad.norm() for p in pl_module.network.parameters() if p.grad is not None]
            if gradients:
                norms.append((trainer.current_epoch, float(torch.stack(gradients).norm())))

    trainer(2, callbacks=[Measure()]).fit(module(DivideMix, warmup_clip=1e-3, clip_threshold=True), data())
    assert max(norm for epoch, norm in norms if epoch == 0) <= 1e-3 * 1.001
    assert max(norm for epoch, norm in norms if epoch == 1) > 1e-2
