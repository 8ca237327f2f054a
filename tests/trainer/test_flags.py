"""Every flag and precision of Lightning's trainer, with SANM as callback, as mixin and in a method."""

import inspect
import typing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision
from lightning.pytorch.profilers import SimpleProfiler

from sanm_lightning.methods import CrossEntropy, OneCycle, Stage
from tests.full import FULL
from tests.trainer.kinds import BATCH, EPOCHS, KINDS, RATE, SAMPLES, STEPS, Recorder, equal, fit, weights

TESTED = KINDS if FULL else ("method",)
BAREBONES = {
    "barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None,
    "enable_model_summary": None, "num_sanity_val_steps": None, "log_every_n_steps": None,
}  # fmt: skip
UNCHANGED: dict[str, list[dict[str, Any]]] = {  # the weights after training are those without the flag
    "barebones": [BAREBONES],
    "benchmark": [{"benchmark": True}],
    "check_val_every_n_epoch": [{"check_val_every_n_epoch": 2}],
    "detect_anomaly": [{"detect_anomaly": True}],
    "deterministic": [{"deterministic": True}],
    "enable_autolog_hparams": [{"enable_autolog_hparams": False}],
    "inference_mode": [{"inference_mode": False}],
    "limit_val_batches": [{"limit_val_batches": 0}, {"limit_val_batches": 1}],
    "log_every_n_steps": [{"log_every_n_steps": 0}],
    "num_sanity_val_steps": [{"num_sanity_val_steps": -1}],
    "profiler": [{"profiler": "simple"}, {"profiler": "advanced"}],
    "reload_dataloaders_every_n_epochs": [{"reload_dataloaders_every_n_epochs": 1}],
    "sync_batchnorm": [{"sync_batchnorm": True}],  # of several processes, see tests/methods/test_two_processes.py
    "use_distributed_sampler": [{"use_distributed_sampler": False}],
    "val_check_interval": [
        {"val_check_interval": 0.5}, {"val_check_interval": 6, "check_val_every_n_epoch": None},
    ],
}  # fmt: skip
COUNTED: dict[str, list[tuple[dict[str, Any], int]]] = {  # optimizer steps
    "accumulate_grad_batches": [({"accumulate_grad_batches": 3}, EPOCHS * 2)],
    "fast_dev_run": [({"fast_dev_run": True}, 1), ({"fast_dev_run": 2}, 2)],
    "limit_train_batches": [({"limit_train_batches": 2}, EPOCHS * 2), ({"limit_train_batches": 0.5}, EPOCHS * 2)],
    "max_epochs": [({"epochs": 0}, 0), ({"epochs": -1, "max_steps": 5}, 5)],
    "max_steps": [({"max_steps": 5}, 5), ({"max_steps": 0}, 0)],
    "max_time": [({"max_time": timedelta(0)}, 0), ({"max_time": timedelta(0), "min_steps": 3, "epochs": -1}, STEPS)],
    "min_epochs": [({"max_time": timedelta(0), "min_epochs": 2, "epochs": -1}, 2 * STEPS)],
    "min_steps": [({"max_time": timedelta(0), "min_steps": STEPS + 1, "epochs": -1}, STEPS + 1)],
    "overfit_batches": [({"overfit_batches": 2}, EPOCHS * 2)],
}
ELSEWHERE = {
    "accelerator", "callbacks", "default_root_dir", "devices", "enable_checkpointing", "enable_model_summary",
    "enable_progress_bar", "gradient_clip_algorithm", "gradient_clip_val", "limit_predict_batches",
    "limit_test_batches", "logger", "model_registry", "num_nodes", "plugins", "precision", "strategy",
}  # fmt: skip
"""Tested below, in test_callbacks.py, or in the tests of command line and of two processes."""
pytestmark = pytest.mark.filterwarnings(
    "ignore:You requested to overfit but enabled .* dataloader shuffling",
    "ignore:.*barebones=True",
    "ignore:expected max_steps beyond",
    "ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'.`",
    "ignore:Lightning couldn't infer the indices fetched",
)


def test_every_flag_of_the_trainer_is_classified():
    assert {*UNCHANGED, *COUNTED, *ELSEWHERE} == set(inspect.signature(L.Trainer).parameters)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Weights after a fit without flags."""
    return {kind: weights(fit(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", TESTED)
@pytest.mark.parametrize("flags", [flags for listed in UNCHANGED.values() for flags in listed], ids=str)
def test_it_leaves_the_training_unchanged(flags, kind, alone):
    assert equal(weights(fit(kind, **flags)), alone[kind])


@pytest.mark.parametrize("kind", TESTED)
@pytest.mark.parametrize(("flags", "steps"), [case for listed in COUNTED.values() for case in listed], ids=str)
def test_the_optimizer_steps(flags, steps, kind):
    assert fit(kind, **flags).global_step == steps


@pytest.mark.parametrize("kind", TESTED)
class TestGradients:
    @pytest.mark.parametrize("algorithm", ["norm", "value"])
    def test_clipped_gradients_bound_the_first_step(self, algorithm, kind):
        largest = 1e-3
        recorder = Recorder()
        fit(kind, recorder, max_steps=1, gradient_clip_val=largest, gradient_clip_algorithm=algorithm)
        before, after = recorder.epochs[0], recorder.batches[0]
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before]) / RATE
        bounded = moved.norm() if algorithm == "norm" else moved.abs().max()
        assert float(bounded) == pytest.approx(largest, rel=0.02)


class TestWithoutEnd:
    def test_a_schedule_over_the_training_is_refused(self):
        made = {"scheduler": lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps)}
        with pytest.raises(
            ValueError, match="expected max_epochs or max_steps for a schedule over the whole training, got"
        ):
            fit("method", epochs=-1, max_time=timedelta(seconds=1), made=made)

    def test_a_schedule_over_max_steps_ends_with_them(self):
        made = {"scheduler": lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps)}
        run = fit("method", epochs=-1, max_steps=7, made=made)
        assert run.lr_scheduler_configs[0].scheduler.total_steps == run.global_step == 7

    def test_a_stage_without_a_length_is_refused(self):
        with pytest.raises(
            ValueError, match="expected max_epochs or max_steps for a stage with a factor and without a length"
        ):
            fit("method", epochs=-1, max_time=timedelta(seconds=1), made={"method": Fading})

    def test_a_stage_without_a_length_ends_with_max_steps(self):
        fit("method", epochs=-1, max_steps=2 * STEPS, made={"method": Fading})
        assert Fading.seen[-2 * STEPS :] == [(step, 2 * STEPS) for step in range(2 * STEPS)]


class Fading(CrossEntropy):
    """A method whose rate depends on the step of its only stage."""

    seen: list[tuple[int, int]] = []

    def stages(self) -> list[Stage]:
        return [Stage("train", factor=self.factor)]

    def factor(self, step: int, steps: int) -> float:
        self.seen.append((step, steps))
        return 1.0


PRECISIONS = {
    "32-true": torch.float32, "bf16-mixed": torch.float32, "16-mixed": torch.float32, "64-true": torch.float64,
    "bf16-true": torch.bfloat16, "16-true": torch.float16,
}  # fmt: skip
NOT_INSTALLED = {"transformer-engine", "transformer-engine-float16"}


def test_every_precision_of_lightning_is_classified():
    assert {*PRECISIONS, *NOT_INSTALLED} == set(typing.get_args(_PRECISION_INPUT_STR))


@pytest.mark.parametrize("kind", TESTED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_first_epoch_is_close_to_single_precision_and_the_others_are_finite(precision, kind):
    found, single = Recorder(), Recorder()
    fit(kind, found, precision=precision)
    fit(kind, single, epochs=1)
    for name, value in single.batches[-1].items():  # later masks depend on a maximum, and so on the rounding
        one = found.batches[STEPS - 1][name]
        assert one.dtype == PRECISIONS[precision]
        torch.testing.assert_close(one.float(), value, atol=0.02, rtol=0.05, msg=name)
    assert all(bool(value.isfinite().all()) for value in found.batches[-1].values())


@pytest.mark.parametrize("precision", PRECISIONS if FULL else ("bf16-true", "64-true"))
def test_a_pass_over_the_training_set_is_close_to_single_precision(precision):
    def logits(precision: str) -> torch.Tensor:
        found = []
        noted = LambdaCallback(
            on_train_end=lambda trainer, module: found.append(module.predict_train("logits")["logits"])
        )
        fit("method", noted, epochs=1, precision=precision)
        return found[0]

    torch.testing.assert_close(logits(precision).float(), logits("32-true"), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", TESTED)
@pytest.mark.parametrize(
    ("plugin", "precision"),
    [(lambda: MixedPrecision("bf16-mixed", "cpu"), "bf16-mixed"), (DoublePrecision, "64-true")],
    ids=["mixed", "double"],
)
def test_a_precision_plugin_equals_its_flag(plugin: Callable[[], Any], precision, kind):
    assert equal(weights(fit(kind, plugins=[plugin()])), weights(fit(kind, precision=precision)))


@pytest.mark.parametrize("kind", TESTED)
def test_a_profiler_counts_the_steps(kind):
    profiler = SimpleProfiler(".", "profile")
    fit(kind, profiler=profiler)
    assert len(profiler.recorded_durations["run_training_batch"]) == EPOCHS * STEPS == EPOCHS * SAMPLES // BATCH
