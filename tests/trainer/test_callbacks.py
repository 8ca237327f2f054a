"""Every callback that Lightning exports, with SANM as callback (listed before and after), as mixin and in a method."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.lr_finder import _LRCallback
from torch import nn

from sanm_lightning.cli import entry_point
from sanm_lightning.methods import ELR, CrossEntropy, OneCycle, Stage
from tests.full import FULL
from tests.methods.toy import trainer
from tests.trainer.kinds import (
    BATCH,
    CLASSES,
    EPOCHS,
    KINDS,
    RATE,
    SAMPLES,
    STEPS,
    Recorder,
    equal,
    fit,
    make,
    mean,
    trained,
    weights,
)

BASES = {"BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "ProgressBar"}
"""Classes to derive from; BackboneFinetuning, a writer, ModelCheckpoint and the bars are derived from them."""
CHANGES_TRAINING = {  # each with a test of its own
    "BackboneFinetuning", "BatchSizeFinder", "EMAWeightAveraging", "EarlyStopping", "GradientAccumulationScheduler",
    "LearningRateFinder", "ModelPruning", "StochasticWeightAveraging", "Timer", "WeightAveraging",
}  # fmt: skip
LEAVES_TRAINING: dict[str, tuple[Callable[[], L.Callback], dict[str, Any]]] = {
    "DeviceStatsMonitor": (lambda: callbacks.DeviceStatsMonitor(cpu_stats=False), {"logger": True}),
    "LambdaCallback": (callbacks.LambdaCallback, {}),
    "LearningRateMonitor": (callbacks.LearningRateMonitor, {"logger": True}),
    "ModelCheckpoint": (callbacks.ModelCheckpoint, {"enable_checkpointing": True}),
    "ModelSummary": (lambda: callbacks.ModelSummary(max_depth=-1), {"enable_model_summary": True}),
    "OnExceptionCheckpoint": (lambda: callbacks.OnExceptionCheckpoint("."), {"enable_checkpointing": True}),
    "RichModelSummary": (callbacks.RichModelSummary, {"enable_model_summary": True}),
    "RichProgressBar": (callbacks.RichProgressBar, {"enable_progress_bar": True}),
    "SpikeDetection": (callbacks.SpikeDetection, {}),
    "ThroughputMonitor": (lambda: callbacks.ThroughputMonitor(lambda batch: len(batch[0])), {"logger": True}),
    "TQDMProgressBar": (callbacks.TQDMProgressBar, {"enable_progress_bar": True}),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The provided params to be frozen already exist",
    "ignore:When using the `ThroughputMonitor`, you need to define a `flops_per_batch`",
    "ignore:.*was called without a model. The last model of the previous",
    "ignore:.*there is no last checkpoint available",
)
FOREIGN = tuple(kind for kind in KINDS if kind != "method")


def test_every_callback_of_lightning_is_classified():
    assert {*BASES, *CHANGES_TRAINING, *LEAVES_TRAINING} == set(callbacks.__all__)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Weights after a fit without further callbacks."""
    return {kind: weights(fit(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS if FULL else ("method",))
@pytest.mark.parametrize("name", LEAVES_TRAINING)
def test_it_leaves_the_training_unchanged(name, kind, alone):
    create, flags = LEAVES_TRAINING[name]
    flags = {**flags, **({"logger": CSVLogger(".")} if "logger" in flags else {})}
    assert equal(weights(fit(kind, create(), **flags)), alone[kind])


@pytest.mark.parametrize("kind", KINDS)
class TestWeightAveraging:
    def test_the_final_weights_are_the_mean_over_all_steps(self, kind):
        recorder = Recorder()
        run = fit(kind, recorder, callbacks.WeightAveraging(use_buffers=False))
        assert len(recorder.batches) == EPOCHS * STEPS
        torch.testing.assert_close(trained(run), mean(recorder.batches))

    def test_the_final_weights_are_the_exponential_moving_average(self, kind):
        recorder = Recorder()
        run = fit(kind, recorder, callbacks.EMAWeightAveraging(decay=0.5))
        average = recorder.batches[0]
        for current in recorder.batches[1:]:
            average = {name: 0.5 * value + 0.5 * current[name] for name, value in average.items()}
        torch.testing.assert_close(trained(run), average)

    def test_the_final_weights_are_the_mean_over_epochs_for_swa(self, kind):
        recorder = Recorder()
        run = fit(kind, recorder, callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2))
        torch.testing.assert_close(trained(run), mean(recorder.epochs[1:EPOCHS]))

    @pytest.mark.parametrize(
        "create",
        [
            lambda: callbacks.EMAWeightAveraging(decay=0.5),
            lambda: callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        ],
        ids=["ema", "swa"],
    )
    def test_a_resumed_run_ends_with_the_same_weights(self, create, kind):
        def saver() -> L.Callback:
            return callbacks.ModelCheckpoint(".", "{epoch}", save_top_k=-1)

        whole = fit(kind, create(), saver(), enable_checkpointing=True)
        resumed = fit(kind, create(), saver(), enable_checkpointing=True, ckpt_path="epoch=1.ckpt")
        one, other = (run.lightning_module.state_dict() for run in (whole, resumed))
        assert equal(*({name: v for name, v in state.items() if torch.is_tensor(v)} for state in (one, other)))


def test_averages_are_saved_with_the_per_sample_state_of_the_training():
    saver = callbacks.ModelCheckpoint(".", "last")
    fit("method", callbacks.EMAWeightAveraging(), saver, enable_checkpointing=True, made={"method": ELR})
    checkpoint = torch.load("last.ckpt", weights_only=True)
    averages, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    tables = {name: value["tables"] for name, value in current.items() if isinstance(value, dict) and "tables" in value}
    assert any(bool(table.any()) for found in tables.values() for table in found.values())
    for name, found in tables.items():
        torch.testing.assert_close(averages[name]["tables"], found)
    weight = next(name for name in current if name.endswith(".weight"))
    assert not torch.equal(averages[weight], current[weight])


class TestBatchSizeFinder:
    def test_a_method_trains_with_at_most_all_samples_and_a_schedule_of_that_length(self):
        finder = size_finder()
        run = fit(
            "method", finder, made={"scheduler": lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps)}
        )
        assert finder.optimal_batch_size == run.datamodule.batch_size == SAMPLES
        assert run.lr_scheduler_configs[0].scheduler.total_steps == run.global_step == EPOCHS

    @pytest.mark.parametrize("kind", KINDS if FULL else ("mixin", "method"))
    def test_the_run_equals_one_with_that_batch_size(self, kind):
        run = fit(kind, size_finder())
        found = run.datamodule.batch_size
        assert found >= SAMPLES
        assert equal(weights(run), weights(fit(kind, made={"batch_size": found})))

    @pytest.mark.skipif(not FULL, reason="in make test-all")
    @pytest.mark.parametrize("kind", FOREIGN)
    def test_it_finds_the_same_size_as_without_sanm(self, kind):
        finder, plain = size_finder(), size_finder()
        fit(kind, finder)
        module, data, _ = make("callback-after")
        fit_without(module, data, plain)
        assert finder.optimal_batch_size == plain.optimal_batch_size

    def test_a_method_refuses_to_resume_with_it(self):
        saver = callbacks.ModelCheckpoint(".", "{epoch}")
        fit("method", saver, enable_checkpointing=True)
        with pytest.raises(ValueError, match="expected a new run with BatchSizeFinder, got a checkpoint to resume"):
            fit("method", size_finder(), saver, enable_checkpointing=True, ckpt_path="epoch=2.ckpt", epochs=5)


def size_finder() -> callbacks.BatchSizeFinder:
    return callbacks.BatchSizeFinder(init_val=SAMPLES // 2, steps_per_trial=1)


def fit_without(module: Any, data: Any, *listed: L.Callback) -> L.Trainer:
    run = trainer(EPOCHS, callbacks=list(listed))
    run.fit(module, data)
    return run


class TestLearningRateFinder:
    @pytest.mark.parametrize("kind", KINDS if FULL else ("callback-before", "method"))
    def test_the_run_equals_one_with_the_rate_that_was_found(self, kind):
        run = fit(kind, finder := callbacks.LearningRateFinder(num_training_steps=20), epochs=6)
        found = finder.optimal_lr.suggestion()
        assert run.lightning_module.lr == found != RATE
        assert equal(weights(run), weights(fit(kind, epochs=6, made={"lr": found})))

    def test_a_schedule_starts_from_the_rate_that_was_found(self):
        schedule = {
            "scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
        }
        recorder, finder = Recorder(), callbacks.LearningRateFinder(num_training_steps=20)
        fit("method", finder, recorder, epochs=6, made=schedule)
        found = finder.optimal_lr.suggestion()
        assert recorder.rates[::STEPS] == [pytest.approx(found * 0.5**epoch) for epoch in range(6)]

    def test_rates_that_end_in_nan_leave_no_trace(self, alone):
        finder = callbacks.LearningRateFinder(
            num_training_steps=20, max_lr=1e30, early_stop_threshold=None, update_attr=False
        )
        run = fit("method", finder, epochs=6)
        assert not all(math.isfinite(loss) for loss in finder.optimal_lr.results["loss"])
        assert equal(weights(run), weights(fit("method", epochs=6)))

    @pytest.mark.parametrize("peak", [2.0, 1000.0])
    def test_a_suggestion_is_refused_if_the_loss_diverges_at_a_smaller_rate(self, peak):
        losses = iter([*[1.0] * 14, *[peak] * 10, *[0.0] * 16])

        class Scripted(CrossEntropy):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss if self.trainer.callbacks[0].__class__ is not _LRCallback else loss * 0 + next(losses)

        finder = callbacks.LearningRateFinder(num_training_steps=40, early_stop_threshold=None)
        refused = pytest.raises(
            ValueError, match=r"below the rate at which the loss diverges, got .*; set early_stop_thr"
        )
        with refused if peak > 4 else nullcontext():
            fit("method", finder, epochs=12, made={"method": Scripted})
        assert finder.optimal_lr._optimal_idx >= 24  # where the loss falls

    def test_a_method_begins_each_epoch_of_the_trials(self):
        class Counting(CrossEntropy):
            begun = 0

            def begin_epoch(self) -> None:
                self.begun += 1

        finder = callbacks.LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        run = fit("method", finder, epochs=6, made={"method": Counting})
        assert run.lightning_module.begun == 20 // STEPS + 6

    def test_a_stage_with_its_own_rate_is_refused(self):
        class Staged(CrossEntropy):
            def stages(self) -> list[Stage]:
                return [Stage("early", epochs=1), Stage("late", lr=0.1)]

        with pytest.raises(ValueError, match="got another one in the stage 'late' of Staged"):
            fit("method", callbacks.LearningRateFinder(), made={"method": Staged})

    def test_too_few_losses_are_refused(self):
        with pytest.raises(
            ValueError, match="expected at least 13 steps of LearningRateFinder with finite losses, got 8"
        ):
            fit("method", callbacks.LearningRateFinder(), epochs=2)

    def test_a_schedule_with_its_own_rates_is_refused(self):
        made = {"scheduler": lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps)}
        with pytest.raises(
            ValueError, match="starts from the optimizer's learning rate for LearningRateFinder, got OneCycle"
        ):
            fit("method", callbacks.LearningRateFinder(), made=made)


class TestModelPruning:
    @pytest.mark.parametrize("kind", KINDS)
    def test_half_of_the_network_is_zero_and_nothing_of_the_decoder(self, kind):
        pruning = callbacks.ModelPruning(
            "l1_unstructured", apply_pruning=lambda epoch: epoch == 0, amount=0.5, use_lottery_ticket_hypothesis=False
        )
        run = fit(kind, pruning)
        network: nn.Module = run.lightning_module.network
        pruned = torch.cat([value.flatten() for value in network.parameters()])
        assert int((pruned == 0).sum()) == round(0.5 * len(pruned))
        decoder = [value for name, value in weights(run).items() if name.startswith("decoder.")]
        assert decoder and all(bool(value.all()) for value in decoder if value.ndim > 1)


class TestBackboneFinetuning:
    @pytest.mark.parametrize("kind", FOREIGN)
    def test_the_backbone_is_frozen_until_its_epoch(self, kind):
        recorder = Recorder()
        fit(kind, recorder, callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2))
        first, second, third = recorder.epochs
        last = recorder.batches[-1]
        body, head = "network.body.0.weight", "network.fc.weight"
        assert torch.equal(first[body], third[body]) and not torch.equal(third[body], last[body])
        assert not torch.equal(first[head], second[head])

    def test_a_method_without_a_backbone_is_refused(self):
        with pytest.raises(
            ValueError, match="expected a submodule 'backbone' for BackboneFinetuning, got none in CrossE"
        ):
            fit("method", callbacks.BackboneFinetuning())


@pytest.mark.parametrize("kind", KINDS if FULL else ("callback-before", "method"))
class TestStopping:
    def test_early_stopping_ends_the_training_at_its_threshold(self, kind):
        run = fit(kind, callbacks.EarlyStopping("train/loss", stopping_threshold=100.0))
        assert run.global_step == STEPS

    def test_a_timer_ends_the_training(self, kind):
        class Steps(callbacks.Timer):
            """A timer for which a step takes a second."""

            def time_elapsed(self, *args: Any) -> float:
                return float(run_steps)

        def count(*args: Any) -> None:
            nonlocal run_steps
            run_steps += 1

        run_steps = 0
        run = fit(kind, callbacks.LambdaCallback(on_train_batch_end=count), Steps({"seconds": 5}))
        assert run.global_step == 5


class TestGradientAccumulationScheduler:
    @pytest.mark.parametrize("kind", KINDS if FULL else ("callback-before", "method"))
    def test_the_optimizer_steps_as_scheduled(self, kind):
        assert fit(kind, callbacks.GradientAccumulationScheduler({1: 2})).global_step == STEPS + 2 * STEPS // 2

    def test_a_schedule_over_the_training_has_as_many_steps(self):
        made = {"scheduler": lambda optimizer, total_steps: OneCycle(optimizer, 0.1, total_steps)}
        run = fit("method", callbacks.GradientAccumulationScheduler({1: 2}), made=made)
        assert run.lr_scheduler_configs[0].scheduler.total_steps == run.global_step == 8


@pytest.mark.parametrize("kind", KINDS if FULL else ("callback-before", "method"))
class TestRecords:
    def test_learning_rates_are_those_of_the_optimizer(self, kind):
        monitor = callbacks.LearningRateMonitor()
        fit(kind, monitor, logger=CSVLogger("."))
        assert monitor.lrs["lr-SGD"] == [RATE] * len(monitor.lrs["lr-SGD"]) != []

    def test_the_best_checkpoint_is_that_of_the_lowest_loss(self, kind):
        losses = []
        noted = callbacks.LambdaCallback(
            on_train_epoch_end=lambda trainer, module: losses.append(float(trainer.callback_metrics["train/loss"]))
        )
        saver = callbacks.ModelCheckpoint(".", "{epoch}", monitor="train/loss", auto_insert_metric_name=False)
        fit(kind, noted, saver, enable_checkpointing=True, limit_val_batches=0)
        assert Path(saver.best_model_path).name == f"{losses.index(min(losses))}.ckpt"

    def test_an_exception_leaves_a_checkpoint_of_its_step(self, kind):
        recorder = Recorder()

        def stop(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == STEPS + 1:
                raise ValueError("interrupted")

        noted = callbacks.LambdaCallback(on_train_batch_start=stop)
        saver = callbacks.OnExceptionCheckpoint(".", "stopped")
        with pytest.raises(ValueError, match="interrupted"):
            fit(kind, recorder, noted, saver, enable_checkpointing=True)
        saved = torch.load("stopped.ckpt", weights_only=True)
        assert saved["global_step"] == STEPS + 1
        assert all(
            torch.equal(saved["state_dict"].get(name, value), value) for name, value in recorder.batches[-1].items()
        )

    def test_throughput_counts_the_samples(self, kind):
        fit(kind, callbacks.ThroughputMonitor(lambda batch: len(batch[0])), logger=CSVLogger(".", version=0))
        header, *rows = Path("lightning_logs/version_0/metrics.csv").read_text().splitlines()
        column = header.split(",").index("train/samples")
        counts = [float(cell) for row in rows if (cell := row.split(",")[column])]
        assert counts == [BATCH * step for step in range(1, EPOCHS * STEPS + 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Couldn.t infer the batch indices fetched from your dataloader")
def test_a_prediction_writer_receives_every_prediction(kind):
    class Writer(callbacks.BasePredictionWriter):
        def write_on_epoch_end(self, trainer: Any, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
            rows = [part["probabilities"] if kind == "method" else part for part in predictions]
            self.rows = torch.cat(rows)

    run = fit(kind, epochs=0)
    run.callbacks.append(writer := Writer("epoch"))
    run.predict(run.lightning_module, run.datamodule)
    assert writer.rows.shape == (8 if kind == "method" else SAMPLES, CLASSES)
    torch.testing.assert_close(writer.rows.sum(1), torch.ones(len(writer.rows)))


def test_a_missing_package_is_one_sentence_on_the_command_line(capsys, monkeypatch):
    def missing(words: list[str]) -> None:
        run = trainer(1, logger=CSVLogger("."))
        callbacks.DeviceStatsMonitor().setup(run, None, "fit")

    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("lightning.pytorch.accelerators.cpu._PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("sanm_lightning.cli.commands.run", missing)
    with pytest.raises(SystemExit):
        entry_point()
    assert capsys.readouterr().err.startswith("sanm: `DeviceStatsMonitor` cannot log CPU stats")
