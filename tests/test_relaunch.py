"""A relaunch of the same command goes on in the same run directory, or is refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import entry_point, main

RUN = [
    "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
    "--data", "Toy", "--data.num_samples", "24", "--data.num_test_samples", "16", "--data.batch_size", "8",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.default_root_dir", "here",
]  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning's, of an evaluation or a branch of a run
    pytest.mark.filterwarnings("default:Experiment logs directory"),  # undo the suite's, so that ours is seen
]
FIRST = Path("here/lightning_logs/version_0")


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


def epochs(number: int, *words: str) -> list[str]:
    return [*RUN, "--trainer.max_epochs", str(number), *words]


def refused(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sanm", *words])
    with pytest.raises(SystemExit) as end:
        entry_point()
    assert end.value.code == 2
    monkeypatch.setattr(sys, "argv", ["sanm"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


class TestLast:
    def test_goes_on_in_the_run_directory_of_the_newest_checkpoint(self, recwarn):
        main(epochs(2))
        whole = main(epochs(4, "--trainer.default_root_dir", "whole")).model
        relaunched = main(epochs(4, "--ckpt_path", "last"))
        assert [path.name for path in FIRST.parent.iterdir()] == ["version_0"]
        assert results(FIRST)["epochs"] == 4
        assert relaunched.trainer.global_step == 4 * 3
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), relaunched.model.parameters(), strict=True))
        kept = {path.name for path in (FIRST / "checkpoints").iterdir()}
        assert kept == {"epoch=1-step=6.ckpt", "epoch=3-step=12.ckpt"}  # Lightning keeps the one that was resumed from
        first, second = (
            (FIRST / name).read_text().splitlines() for name in ("metrics_before_resume_0.csv", "metrics.csv")
        )
        assert len(first) == len(second) == 1 + 2 * 2  # a row for training and one for the test set, two epochs each
        assert not [str(warning.message) for warning in recwarn if "will be deleted" in str(warning.message)]

    @pytest.mark.parametrize("logger", ["true", "false"])
    def test_is_refused_where_there_is_none(self, monkeypatch, capsys, logger):
        said = refused(monkeypatch, capsys, *epochs(1, "--ckpt_path", "last", "--trainer.logger", logger))
        assert "expected a checkpoint for --ckpt_path last, got none in " in said
        assert "here" in said
        assert not Path("here").exists(), "something was begun"

    def test_is_the_newest_of_all_runs(self):
        main(epochs(1))
        main(epochs(2))
        assert (FIRST.parent / "version_1").exists()
        (old,) = (FIRST / "checkpoints").iterdir()
        os.utime(old)  # as if the first run had gone on
        assert main(epochs(2, "--ckpt_path", "last")).trainer.ckpt_path == str(old)
        assert results(FIRST)["epochs"] == 2
        assert not (FIRST.parent / "version_2").exists()

    def test_of_a_chosen_version_is_looked_for_there_only(self, monkeypatch, capsys):
        main(epochs(1))
        chosen = [
            "--trainer.logger",
            "CSVLogger",
            "--trainer.logger.save_dir",
            "here",
            "--trainer.logger.version",
            "mine",
        ]
        assert "mine/checkpoints" in refused(monkeypatch, capsys, *epochs(1, *chosen, "--ckpt_path", "last"))
        main(epochs(1, *chosen))
        main(epochs(2, *chosen, "--ckpt_path", "last"))
        assert results(FIRST.parent / "mine")["epochs"] == 2
        assert results(FIRST)["epochs"] == 1

    def test_is_found_without_a_logger_and_in_a_directory_of_its_own(self):
        plain = ["--trainer.logger", "false"]
        main(epochs(1, *plain))
        main(epochs(2, *plain, "--ckpt_path", "last"))
        assert results(Path("here"))["epochs"] == 2
        apart = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", "apart"]
        main(epochs(1, *apart))
        main(epochs(2, *apart, "--ckpt_path", "last"))
        assert results(FIRST)["epochs"] == 2

    def test_of_an_evaluation_leaves_the_run_alone_and_is_not_made_up_either(self, monkeypatch, capsys):
        words = ["test", *epochs(1)[1:-2], "--ckpt_path", "last"]
        main(epochs(1))
        before = (FIRST / "metrics.csv").read_text()
        main(words)
        assert (FIRST / "metrics.csv").read_text() == before
        main(epochs(2, "--ckpt_path", "last"))  # not in the directory of the test
        assert results(FIRST)["epochs"] == 2
        shutil.rmtree("here")
        assert "expected a checkpoint for --ckpt_path last, got none in " in refused(monkeypatch, capsys, *words)


class TestSLURM:
    def test_what_a_signal_left_is_last_and_its_run_goes_on(self):
        cli = main(epochs(1))
        cli.trainer.save_checkpoint("here/hpc_ckpt_1.ckpt")
        assert main(epochs(2, "--ckpt_path", "last")).trainer.ckpt_path == "here/hpc_ckpt_1.ckpt"
        assert results(FIRST)["epochs"] == 2
        assert not (FIRST.parent / "version_1").exists()

    def test_a_requeued_job_goes_on_in_its_run_by_itself(self, monkeypatch):
        cli = main(epochs(1))
        for number in (2, 10):
            cli.trainer.save_checkpoint(f"here/hpc_ckpt_{number}.ckpt")
        monkeypatch.setattr("sanm_lightning.relaunch.SLURMEnvironment.detect", lambda: True)
        # Lightning asks the same question of the machine for its launcher, which is told here not to.
        one = ["--trainer.devices", "1", "--trainer.plugins", "LightningEnvironment"]
        assert main(epochs(2, *one)).trainer.ckpt_path == "here/hpc_ckpt_10.ckpt"
        assert results(FIRST)["epochs"] == 2
        assert not (FIRST.parent / "version_1").exists()

    def test_hpc_is_refused_where_no_signal_left_anything(self, monkeypatch, capsys):
        main(epochs(1))
        assert "expected a checkpoint for --ckpt_path hpc, got none in " in refused(
            monkeypatch, capsys, *epochs(2, "--ckpt_path", "hpc")
        )
        assert results(FIRST)["epochs"] == 1


def test_a_file_that_is_named_begins_a_run_of_its_own():
    main(epochs(1))
    (checkpoint,) = (FIRST / "checkpoints").iterdir()
    main(epochs(2, "--ckpt_path", str(checkpoint)))
    assert results(FIRST)["epochs"] == 1
    assert results(FIRST.parent / "version_1")["epochs"] == 2
