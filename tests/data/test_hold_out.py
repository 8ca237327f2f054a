"""Samples that are held out: of each class its part, never all of it, the same ones in every later run."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sanm_lightning.data import Noise, Toy
from sanm_lightning.data.label_table import stratified_hold_out
from sanm_lightning.methods import CrossEntropy
from sanm_lightning.run.record import RunRecord


class NoTest(Toy):
    """A data set without a test split."""

    @property
    def own_splits(self) -> tuple[str, ...]:
        return ()


def method() -> CrossEntropy:
    return CrossEntropy(4, (16, 16), network="small_cnn", network_args={"width": 4}, warmup_epochs=0)


def trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return L.Trainer(max_epochs=1, enable_model_summary=False, enable_checkpointing=False, **quiet, **options)


class TestStratified:
    @pytest.mark.parametrize("size", [1, 12, 30, 55])
    def test_every_class_gives_its_part(self, size: int) -> None:
        labels = torch.tensor([0] * 40 + [1] * 16 + [2] * 4)[torch.randperm(60)]
        for seed in range(20):
            held = stratified_hold_out(labels, size, seed)
            assert int(held.sum()) == size
            counts = labels[held].bincount(minlength=3)
            assert ((counts - size * labels.bincount() / 60).abs() <= 1).all()

    def test_no_class_is_preferred(self) -> None:
        labels = torch.arange(400) % 100
        held = [labels[stratified_hold_out(labels, 40, seed)] for seed in range(30)]
        assert all(len(part.unique()) == 40 for part in held)
        assert len(torch.cat(held).unique()) == 100

    def test_one_of_each_class_stays(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 50 + [2] * 2 + [4])
        for seed in range(50):
            for size in (31, 80, 103):
                kept = labels[~stratified_hold_out(labels, size, seed)]
                assert kept.unique().tolist() == [0, 1, 2, 4]
        assert int(stratified_hold_out(labels, 103, 0).sum()) == 99

    def test_depends_on_the_seed_only(self) -> None:
        labels = torch.arange(60) % 3
        one, same, other = (stratified_hold_out(labels, 12, seed) for seed in (1, 1, 2))
        assert torch.equal(one, same) and not torch.equal(one, other)

    def test_of_noisy_labels_by_what_is_given(self) -> None:
        data = Toy(num_samples=80, noise=Noise("symmetric_exclusive", 0.5), val_fraction=0.25, seed=3)
        given = torch.cat([data.labels, data.table("val").labels]).bincount()
        assert ((data.table("val").labels.bincount() - given / 4).abs() <= 1).all()

    def test_noise_and_subset_are_those_without_a_split(self) -> None:
        options: dict[str, Any] = {"noise": Noise("symmetric", 0.5), "max_train_samples": 40, "seed": 3}
        whole, split = Toy(**options), Toy(**options, val_fraction=0.2)
        both = {name: split.table(name) for name in ("train", "val")}
        origin = torch.cat([table.origin for table in both.values()])
        labels = torch.cat([table.labels for table in both.values()])
        assert torch.equal(origin.sort().values, whole.table("train").origin)
        assert torch.equal(labels[origin.argsort()], whole.labels)


class TestWithoutATestSplit:
    def test_a_tenth_is_held_out_and_said_once(self, caplog: pytest.LogCaptureFixture) -> None:
        data = NoTest(seed=1, noise=Noise("symmetric_exclusive", 0.5))
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup(), data.setup("test")
        assert (data.num_samples, len(data.table("val").labels)) == (58, 6)
        assert (data.eval_names, data.test_names) == (["val"], ["val"])
        said = [record.message for record in caplog.records]
        assert len(said) == 1 and "6 training samples are held out for evaluation as 'val'" in said[0]
        assert "their labels are as noisy as the training labels" in said[0]

    def test_tracking_changes_no_sample(self) -> None:
        tracked, not_tracked = (NoTest(seed=1, track_test=track) for track in (True, False))
        assert torch.equal(tracked.table("train").origin, not_tracked.table("train").origin)

    def test_val_fraction_counts_where_it_is_given(self) -> None:
        assert len(NoTest(seed=1, val_fraction=0.5).table("val").labels) == 32

    def test_there_is_no_table_of_a_test_split(self) -> None:
        with pytest.raises(ValueError, match="expected a test split in the data, got none"):
            NoTest(seed=1).table("test")

    def test_few_samples_give_one(self) -> None:
        assert len(NoTest(num_samples=8, seed=1).table("val").labels) == 1
        with pytest.raises(ValueError, match="gives 0 samples for validation and 4 for training"):
            NoTest(num_samples=4, seed=1).setup()

    def test_results_do_not_call_it_a_test(self) -> None:
        record = RunRecord()
        run = trainer(callbacks=[record])
        module = method()
        run.fit(module, NoTest(seed=1))
        results = record.results(run, module, 1)
        assert results["test_accuracy_last"] is results["test_accuracy_best"] is None
        assert results["val_accuracy_last"] == results["val_accuracy_best"] == float(run.callback_metrics["val/acc"])
        restored = RunRecord()
        restored.load_state_dict(record.state_dict())
        assert restored.val_accuracies == record.val_accuracies
        restored.load_state_dict({"accuracies": {}, "seconds": 1.0})  # of an earlier version
        assert restored.val_accuracies == {}

    def test_a_later_evaluation_takes_the_same_samples(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        first, run = NoTest(), trainer()
        run.fit(method(), first)
        run.save_checkpoint(tmp_path / "a.ckpt")
        for evaluate in ("test", "validate"):
            torch.manual_seed(2)
            second = NoTest()
            getattr(trainer(), evaluate)(method(), second, ckpt_path=tmp_path / "a.ckpt", verbose=False)
            assert torch.equal(second.table("val").origin, first.table("val").origin)
        other = NoTest(noise=Noise("pair", 0.5))
        with pytest.raises(ValueError, match="from which the split 'val' is held out, got different labels"):
            trainer().test(method(), other, ckpt_path=tmp_path / "a.ckpt", verbose=False)
