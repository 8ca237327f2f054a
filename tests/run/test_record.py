"""results.json: what it says, and that nothing is lost."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sanm_lightning import SANM, CrossEntropy, ImageFolder, Noise, SANMCallback
from sanm_lightning.data import Toy
from sanm_lightning.pictures import SANMPictures
from sanm_lightning.run.checkpoint import RunCheckpoint
from sanm_lightning.run.record import RunRecord, label_quality_auc, write_json
from sanm_lightning.run.timing import Timing
from tests.methods.toy import data, method, trainer
from tests.test_class_names import pictures


def results() -> dict:
    with open("results.json") as file:
        return json.load(file)


def test_the_clock_of_a_second_fit_begins_at_zero(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("sanm_lightning.run.timing.time.monotonic", lambda: next(now))
    timing = Timing()
    for _ in range(2):
        timing.start("a processor")
        timing.pause()
        timing.proceed(0)
        assert timing.until == {0: 20}  # of 30 seconds, 10 of an evaluation
        assert timing.machines == ["a processor"]


def test_a_checkpoint_written_during_an_evaluation_has_the_time_of_training_only(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("sanm_lightning.run.timing.time.monotonic", lambda: next(now))
    timing = Timing()
    timing.start("a processor")
    timing.pause()
    seconds, state = timing.seconds(), timing.state_dict()
    again = Timing()
    again.load_state_dict(seconds, state)
    again.start("a processor")
    again.proceed(1)
    assert seconds == 20
    assert state["evaluating"] == 20
    assert again.until == {1: 10}  # of another step, and none of the interrupted evaluation


class TestResults:
    def test_best_is_that_of_all_evaluations_also_in_the_middle_of_an_epoch(self, monkeypatch):
        found = []

        class Watch(L.Callback):
            def on_validation_start(self, run, module):
                found.append(0.3 if found else 0.9)  # the first evaluation of four

        monkeypatch.setattr(L.Trainer, "callback_metrics", property(lambda run: {"test/acc": torch.tensor(found[-1])}))
        record = RunRecord()
        run = trainer(2, callbacks=[Watch(), record], val_check_interval=2)
        run.fit(method(), data())
        assert found == [0.9, 0.3, 0.3, 0.3]
        again = RunRecord()
        again.load_state_dict(record.state_dict())
        for part in (record, again):
            said = part.results(run, method(), epochs=2)
            assert said["test_accuracy_best"] == pytest.approx(0.9)
            assert said["test_accuracy_last"] == pytest.approx(0.3)

    def test_of_a_module_of_ones_own_name_the_sanm_of_the_callback(self):
        class Own(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = method().network

            def training_step(self, batch, batch_idx):
                return torch.nn.functional.cross_entropy(self.net(batch.images), batch.labels)

            def validation_step(self, batch, batch_idx):
                pass

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer(2, callbacks=[SANMCallback(SANM(mu=0.5)), RunRecord()], limit_val_batches=0).fit(Own(), data())
        said = results()
        assert said["sanm"] is True
        assert said["quality_auc"] is not None

    def test_best_last_and_last10_are_those_of_the_series(self):
        record = RunRecord()
        run, module = trainer(1, callbacks=[record]), method()
        run.fit(module, data())
        record.accuracies = {epoch: epoch / 100 for epoch in range(20)} | {3: 0.9}
        said = record.results(run, module, epochs=20)
        assert said["test_accuracy_best"] == 0.9
        assert said["test_accuracy_last"] == 0.19
        assert said["test_accuracy_last10"] == pytest.approx(sum(range(10, 20)) / 1000)

    @pytest.mark.parametrize(
        ("fraction", "saver", "expected"),
        [
            (0.25, RunCheckpoint, "val"),
            (0.0, RunCheckpoint, "test"),
            (0.25, lambda: ModelCheckpoint(monitor="val/acc", mode="max"), "val"),
            (0.25, lambda: ModelCheckpoint(monitor="train/loss"), "train/loss"),
            (0.25, ModelCheckpoint, None),
        ],
    )
    def test_name_the_split_that_selected_the_weights(self, fraction, saver, expected):
        run = trainer(1, callbacks=[RunRecord(), saver()], enable_checkpointing=True)
        run.fit(method(), Toy(seed=3, val_fraction=fraction))
        assert results()["selected_on"] == expected

    def test_of_the_end_of_a_fit_mark_a_selection_on_the_test_set(self, caplog):
        run = trainer(1, callbacks=[RunRecord(), RunCheckpoint()], enable_checkpointing=True)
        with caplog.at_level("INFO", "lightning.pytorch"):
            run.fit(method(), Toy(seed=3))
        assert "last.ckpt, best epoch (selected on the test set): " in caplog.messages[-1]

    def test_of_a_file_name_the_labels_that_differ_and_no_unknown_rate(self, tmp_path, caplog):
        root = pictures(tmp_path, "ant", "bee")
        names = [path.relative_to(root).as_posix() for path in sorted((root / "train").rglob("*.png"))]
        rows = [
            f"{name},{'bee' if row == 0 else Path(name).parent.name},{int(row == 1)}" for row, name in enumerate(names)
        ]
        Path("labels.csv").write_text("\n".join(["path,label,drop", *rows]))
        module = CrossEntropy(2, (16, 16), network="small_cnn", network_args={"width": 4})
        folder = ImageFolder(str(root), image_size=16, crop_padding=0, noise=Noise("file", path="labels.csv"))
        with caplog.at_level("INFO", "lightning.pytorch"):
            trainer(1, callbacks=[RunRecord()]).fit(module, folder)
        assert (
            f"labels of labels.csv: 1 of {len(names)} differ from those of the data set, 1 left out" in caplog.messages
        )
        assert "label noise" not in caplog.text

    def test_are_there_after_every_epoch_of_a_run_that_dies(self):
        class Die(SANMPictures):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 2:
                    raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            trainer(4, callbacks=[RunRecord(), Die()]).fit(method(), data())
        assert results()["epochs"] == 2

    def test_of_a_resumed_run_are_those_of_the_whole(self, tmp_path):
        trainer(4, callbacks=[RunRecord()]).fit(method(SANM(seed=0)), data())
        whole = results()
        run = trainer(2, callbacks=[RunRecord()])
        run.fit(method(SANM(seed=0)), data())
        run.save_checkpoint("half.ckpt")
        torch.load("half.ckpt", weights_only=True)
        trainer(4, callbacks=[RunRecord()]).fit(method(SANM(seed=0)), data(), ckpt_path="half.ckpt")
        resumed = results()
        assert resumed.pop("seconds") > 0
        whole.pop("seconds")
        first, second = whole.pop("timing"), resumed.pop("timing")
        assert second.keys() == first.keys() and second["epoch"] == [1, 2, 3, 4]
        assert second["test_accuracy"] == first["test_accuracy"]
        assert second["training_seconds"] == sorted(second["training_seconds"])
        assert resumed == whole

    def test_have_the_training_time_until_each_evaluation_without_that_of_the_evaluations(self, monkeypatch):
        """On a clock that the steps and the evaluations move."""
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])

        class Clock(L.Callback):
            def on_train_batch_end(self, *_):
                now[0] += 10

            def on_validation_batch_end(self, *_):
                now[0] += 1000

        record = RunRecord()
        trainer(2, callbacks=[record, Clock()], limit_train_batches=3, limit_val_batches=2).fit(method(), data())
        timing = results()["timing"]
        assert timing["epoch"] == [1, 2] and timing["training_seconds"] == [30, 60]
        assert timing["evaluation_seconds"] == results()["seconds"] - 60 == 2000
        assert len(timing["test_accuracy"]) == 2 and "val_accuracy" not in timing
        assert timing["test_accuracy"][1] == pytest.approx(results()["test_accuracy_last"], abs=1e-6)
        earlier = {name: part for name, part in record.state_dict().items() if name != "timing"}
        record.load_state_dict(earlier)  # of a checkpoint of an earlier version, whose evaluations were not timed
        assert record.timing.summary() is None and record.state_dict()["timing"]["known"] is False

    def test_a_crash_while_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        write_json(tmp_path / "results.json", {"epochs": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "results.json", {"epochs": object()})
        assert results() == {"epochs": 1}


class TestLabelQualityAUC:
    def test_is_one_for_the_oracle_and_none_without_sanm_or_wrong_labels(self):
        for sanm, source, expected in (
            (SANM(quality="oracle"), data(), 1.0),
            (None, data(), None),
            (SANM(), type(data())(seed=3), None),
        ):
            run, module = trainer(2), method(sanm)
            run.fit(module, source)
            assert label_quality_auc(run, module) == expected

    def test_counts_pairs_in_the_right_order(self):
        run, module, source = trainer(2), method(SANM(seed=0)), data()
        run.fit(module, source)
        quality, right = module.sanm.label_quality.quality, source.labels == source.true_labels
        good, bad = quality[right], quality[~right]
        pairs = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
        assert label_quality_auc(run, module) == pytest.approx(pairs.mean().item(), abs=1e-6)
