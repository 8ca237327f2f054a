"""Every scheduler that torch ships, through the command line, for a method: its learning rates, or a sentence."""

import inspect
import json
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import cli as lightning_cli
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim import lr_scheduler

from sanm_lightning.cli import entry_point, main
from sanm_lightning.methods import Chained, OneCycle, Sequential
from tests.full import FULL
from tests.trainer.kinds import EPOCHS, RATE, STEPS, Recorder, equal, fit, weights


def halve(epoch: int) -> float:
    return 0.5**epoch


TOTAL = EPOCHS * STEPS
CONSTANT = {"class_path": "ConstantLR", "init_args": {"factor": 0.5, "total_iters": 1}}
DECAY = {"class_path": "ExponentialLR", "init_args": {"gamma": 0.5}}
FUNCTION = {"lr_lambda": halve}
PER_EPOCH: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 1}, "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2}, "ExponentialLR": {"gamma": 0.5}, "LambdaLR": FUNCTION,
    "LinearLR": {"total_iters": 2}, "MultiStepLR": {"milestones": [1, 2]}, "MultiplicativeLR": FUNCTION,
    "PolynomialLR": {"total_iters": 4}, "StepLR": {"step_size": 1},
}  # fmt: skip
PER_BATCH: dict[str, dict[str, Any]] = {
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": TOTAL + 3},
}
REFUSED = {  # with a part of the sentence
    "LRScheduler": "expected a scheduler class that computes learning rates, got an abstract class",
    "_LRScheduler": "expected a scheduler class that computes learning rates, got an abstract class",
    "SequentialLR": "got SequentialLR, which requires other schedulers; use Sequential, with the same options",
    "ChainedScheduler": "got ChainedScheduler, which requires other schedulers; use Chained, with the same options",
}
MONITORING = {"ReduceLROnPlateau"}


def words(options: dict[str, Any]) -> list[str]:
    """Return the options of a scheduler as arguments of the command line."""
    found = []
    for name, value in options.items():
        text = (
            f"{__name__}.{value.__name__}"
            if callable(value)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        found += [f"--model.scheduler.{name}", text]
    return found


def run(scheduler: str, options: dict[str, Any], *more: str) -> Recorder:
    """Fit on the command line, and return the learning rate of each batch."""
    fitted = main(
        [
            "fit", "--data", "Toy", "--data.num_samples", "24", "--data.batch_size", "6", "--data.track_test", "false",
            "--data.holdout_fraction", "0", "--model", "CrossEntropy", "--model.network", "small_cnn", "--audit", "false",
            "--model.network_args", "{width: 4}", "--model.optimizer", "SGD", "--model.optimizer.lr", str(RATE),
            "--model.optimizer.momentum", "0.9", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
            "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", str(EPOCHS),
            "--trainer.callbacks+=tests.trainer.kinds.Recorder", "--model.scheduler", scheduler, *words(options), *more,
        ]
    )  # fmt: skip
    recorder = next(part for part in fitted.trainer.callbacks if isinstance(part, Recorder))
    recorder.monitors = [config.monitor for config in fitted.trainer.lr_scheduler_configs]
    return recorder


def by_hand(create: Any, per_batch: bool) -> list[float]:
    """Return the learning rate of each batch of a schedule that is stepped in a loop."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE, momentum=0.9)
    schedule, rates = create(optimizer), []
    for batch in range(1, TOTAL + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if per_batch or batch % STEPS == 0:
            schedule.step()
    return rates


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


def test_every_scheduler_of_torch_is_classified():
    shipped = {
        name
        for name, found in vars(lr_scheduler).items()
        if inspect.isclass(found) and issubclass(found, lr_scheduler.LRScheduler)
    }
    assert {*PER_EPOCH, *PER_BATCH, *REFUSED, *MONITORING} == shipped


@pytest.mark.parametrize("name", [*PER_EPOCH, *PER_BATCH])
class TestRates:
    """The learning rates are those of the schedule by hand."""

    def expected(self, name: str) -> Any:
        options = {**PER_EPOCH, **PER_BATCH}[name]
        rates = by_hand(lambda optimizer: getattr(lr_scheduler, name)(optimizer, **options), name in PER_BATCH)
        assert len(set(rates)) > 1
        return pytest.approx(rates)

    def test_in_python(self, name):
        options = {**PER_EPOCH, **PER_BATCH}[name]
        recorder = Recorder()
        made = {"scheduler": lambda optimizer: getattr(lr_scheduler, name)(optimizer, **options)}
        fit("method", recorder, made=made)
        assert recorder.rates == self.expected(name)

    def test_on_the_command_line(self, name):
        if not FULL and name not in ("CyclicLR", "LambdaLR", "MultiStepLR"):
            pytest.skip("in make test-all")
        assert run(name, {**PER_EPOCH, **PER_BATCH}[name]).rates == self.expected(name)


def test_one_cycle_without_a_length_has_that_of_the_training():
    expected = by_hand(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=TOTAL), True)
    assert run("OneCycleLR", {"max_lr": 0.1}).rates == pytest.approx(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name, capsys, monkeypatch):
    options = {"schedulers": [CONSTANT, DECAY]} if "which requires" in REFUSED[name] else {}
    monkeypatch.setattr(
        "sanm_lightning.cli.commands.run", lambda args: run(f"torch.optim.lr_scheduler.{name}", options)
    )
    with pytest.raises(SystemExit):
        entry_point()
    error = capsys.readouterr().err
    assert error.startswith("sanm: expected")
    assert REFUSED[name] in error


class TestSeveral:
    def test_sequential_runs_one_after_the_other(self):
        def create(optimizer: Any) -> Any:
            parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 1), lr_scheduler.ExponentialLR(optimizer, 0.5)]
            return lr_scheduler.SequentialLR(optimizer, parts, [1])

        found = run("Sequential", {"schedulers": [CONSTANT, DECAY], "milestones": [1]})
        assert found.rates == pytest.approx(by_hand(create, False))

    def test_chained_multiplies_them(self):
        def create(optimizer: Any) -> Any:
            parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 1), lr_scheduler.ExponentialLR(optimizer, 0.5)]
            return lr_scheduler.ChainedScheduler(parts, optimizer)

        assert run("Chained", {"schedulers": [CONSTANT, DECAY]}).rates == pytest.approx(by_hand(create, False))

    @pytest.mark.parametrize("create", [lr_scheduler.OneCycleLR, lr_scheduler.ReduceLROnPlateau])
    def test_schedules_that_are_not_stepped_per_epoch_are_refused(self, create):
        made = {"scheduler": lambda optimizer: Sequential(optimizer, [create], [])}
        with pytest.raises(ValueError, match="expected schedulers in Sequential that are stepped per epoch"):
            fit("method", made=made)
        with pytest.raises(ValueError, match="expected schedulers in Chained that are stepped per epoch"):
            fit("method", made={"scheduler": lambda optimizer: Chained(optimizer, [create])})


class TestReduceLROnPlateau:
    """A rise by 10 is asked of a value, so that every epoch but the first reduces the rate."""

    OPTIONS = {"mode": "max", "patience": 0, "threshold": 10.0, "threshold_mode": "abs"}

    def expected(self, values: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
        schedule, rates = lr_scheduler.ReduceLROnPlateau(optimizer, **self.OPTIONS), []
        for value in values:
            rates += [optimizer.param_groups[0]["lr"]] * STEPS
            schedule.step(value)
        return rates

    @pytest.mark.parametrize("monitor", [None, "train/masked_fraction", *(["train/loss"] if FULL else [])])
    def test_it_follows_its_monitor_or_else_the_loss(self, monitor):
        name = "torch.optim.lr_scheduler" if monitor is None else "lightning.pytorch.cli"
        options = self.OPTIONS if monitor is None else {**self.OPTIONS, "monitor": monitor}
        sanm = ["--model.sanm", "SANM", "--model.warmup_epochs", "0", "--model.sanm.ratio", "fixed"]
        found = run(f"{name}.ReduceLROnPlateau", options, *sanm)
        values = [float(logged[monitor or "train/loss"]) for logged in found.metrics]
        assert found.rates == pytest.approx(self.expected(values))
        assert len(set(found.rates)) > 1
        assert found.monitors == [monitor or "train/loss"]

    def test_the_short_name_is_refused(self):
        with pytest.raises(ValueError, match="expected the full name of ReduceLROnPlateau, got the short name"):
            run("ReduceLROnPlateau", {})

    def test_both_classes_are_accepted_in_python(self):
        def plain(optimizer: Any) -> Any:
            return lr_scheduler.ReduceLROnPlateau(optimizer)

        def named(optimizer: Any) -> Any:
            return lightning_cli.ReduceLROnPlateau(optimizer, "test/acc")

        monitors = [fit("method", made={"scheduler": make}).lr_scheduler_configs[0].monitor for make in (plain, named)]
        assert monitors == ["train/loss", "test/acc"]


class TestLength:
    def test_a_schedule_shorter_than_the_training_is_refused(self):
        with pytest.raises(
            ValueError, match="expected total_steps of 12 or more, the steps of the training, for OneCycleLR"
        ):
            run("OneCycleLR", {"max_lr": 0.1, "total_steps": 5})

    def test_epochs_and_steps_per_epoch_are_kept(self):
        made = {"scheduler": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=4, steps_per_epoch=5)}
        recorder = Recorder()
        fit("method", recorder, made=made)
        expected = by_hand(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20), True)
        assert recorder.rates == pytest.approx(expected)

    @pytest.mark.parametrize(
        "create",
        [
            lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps),
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=TOTAL),
        ],
        ids=["of the training", "given"],
    )
    def test_a_run_resumes_from_the_middle_of_an_epoch(self, create):
        def save(trainer: Any, *args: Any) -> None:
            if trainer.global_step == STEPS + 1:
                trainer.save_checkpoint("middle.ckpt")

        whole = fit("method", LambdaCallback(on_train_batch_end=save), made={"scheduler": create})
        resumed = fit("method", ckpt_path="middle.ckpt", made={"scheduler": create})
        assert equal(weights(whole), weights(resumed))
