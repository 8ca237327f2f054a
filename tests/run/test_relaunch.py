"""A relaunch of the same command goes on in the same run directory, or is refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sanm_lightning import CrossEntropy
from sanm_lightning.cli import entry_point, main
from sanm_lightning.run.relaunch import resolve_ckpt_path
from tests.full import FULL

RUN = [
    "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
    "--data", "Toy", "--data.num_samples", "24", "--data.num_test_samples", "16", "--data.batch_size", "8",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.default_root_dir", "here",
]  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tensorboardX.*"),
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
        assert kept == {"last.ckpt", "best.ckpt"}
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

    def test_is_the_checkpoint_of_most_steps_in_the_newest_run_whatever_the_times_of_the_files(self):
        keep = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k", "-1"]
        main(epochs(4, *keep))
        for number in range(1, 11):  # the eleventh run: versions are numbers, not words
            (FIRST.parent / f"version_{number}" / "checkpoints").mkdir(parents=True)
        main(epochs(3, *keep))
        shutil.copytree("here", "copy")
        for time, path in enumerate(sorted(Path("copy").rglob("*.ckpt"), reverse=True)):
            os.utime(path, (time, time))  # the first epoch of the first run is the last in time
        cli = main(epochs(4, *keep, "--trainer.default_root_dir", "copy", "--ckpt_path", "last"))
        run = Path("copy/lightning_logs/version_11")
        assert results(run)["epochs"] == 4
        first, second = (
            (run / name).read_text().splitlines() for name in ("metrics_before_resume_0.csv", "metrics.csv")
        )
        assert (len(first), len(second)) == (1 + 3 * 2, 1 + 1 * 2), "resumed from the third epoch"
        assert cli.trainer.ckpt_path == str(run / "checkpoints" / "epoch=2-step=9.ckpt")

    def test_is_found_where_a_file_name_makes_a_folder(self):
        named = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.filename", "{epoch}-{test/acc:.3f}"]
        main(epochs(1, *named))
        (checkpoint,) = FIRST.rglob("*.ckpt")
        assert checkpoint.parent.name == "epoch=0-test"
        assert main(epochs(2, *named, "--ckpt_path", "last")).trainer.ckpt_path == str(checkpoint)
        assert results(FIRST)["epochs"] == 2

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


class TestAuto:
    def test_starts_a_run_and_then_continues_it_to_the_weights_of_an_uninterrupted_one(self):
        whole = main(epochs(3, "--trainer.default_root_dir", "whole")).model
        first = main(epochs(2, "--ckpt_path", "auto")).trainer
        assert first.ckpt_path is None and first.global_step == 2 * 3
        again = main(epochs(3, "--ckpt_path", "auto"))
        assert again.trainer.ckpt_path == str(FIRST / "checkpoints" / "last.ckpt")
        assert [path.name for path in FIRST.parent.iterdir()] == ["version_0"]
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.model.parameters(), strict=True))
        before = results(FIRST)
        assert main(epochs(3, "--ckpt_path", "auto")).trainer.global_step == 3 * 3, "a finished run trains no step"
        assert {**results(FIRST), "seconds": 0, "timing": 0} == {**before, "seconds": 0, "timing": 0}

    def test_continues_a_run_that_started_from_weights(self):
        main(epochs(1, "--trainer.default_root_dir", "other", "--seed_everything", "1"))
        words = ["--weights", "other/lightning_logs/version_0/checkpoints/last.ckpt", "--ckpt_path", "auto"]
        main(epochs(1, *words))
        assert main(epochs(2, *words)).trainer.global_step == 2 * 3

    def test_is_refused_for_an_evaluation_with_other_settings_and_with_a_damaged_checkpoint(self, monkeypatch, capsys):
        main(epochs(1))
        assert refused(monkeypatch, capsys, "test", *epochs(1)[1:-2], "--ckpt_path", "auto").startswith(
            "sanm: expected --ckpt_path FILE or last for an evaluation, got auto, which may start from random weights; "
            "use --ckpt_path last"
        )
        said = refused(monkeypatch, capsys, *epochs(2, "--ckpt_path", "auto", "--model.optimizer", "Adam"))
        assert "expected the settings of the checkpoint" in said
        last = FIRST / "checkpoints" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        assert "resume from another checkpoint" in refused(monkeypatch, capsys, *epochs(2, "--ckpt_path", "auto"))


def everything(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Modification time and content of each file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


class TestRefused:
    """A refused relaunch modifies no file."""

    CYCLE = ("--model.scheduler", "OneCycle", "--model.scheduler.max_lr", "0.1")

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--model.optimizer", "SGD", "--model.optimizer.lr", "0.5"], "expected the settings of the checkpoint"),
            (["--data.noise.kind", "symmetric", "--data.noise.rate", "0.5"], "expected the settings of the checkpoint"),
            (["--trainer.max_epochs", "3"], "expected a training of 6 steps"),
            (["--model.netwrk", "cnn9"], "expected an option of CrossEntropy"),
        ],
        ids=["learning rate", "noise", "length of the schedule", "option"],
    )
    @pytest.mark.parametrize("asked", ["last", "here/lightning_logs/version_0/checkpoints/last.ckpt"][: 1 + FULL])
    def test_changes_nothing(self, monkeypatch, capsys, words, said, asked):
        main(epochs(2, *self.CYCLE))
        before = everything(Path("here"))
        assert said in refused(monkeypatch, capsys, *epochs(2, *self.CYCLE, "--ckpt_path", asked, *words))
        assert everything(Path("here")) == before

    def test_damaged_checkpoint_changes_nothing(self, monkeypatch, capsys):
        main(epochs(1))
        last = FIRST / "checkpoints" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        before = everything(Path("here"))
        assert "resume from another checkpoint" in refused(monkeypatch, capsys, *epochs(2, "--ckpt_path", "last"))
        assert everything(Path("here")) == before


class TestCheckpoints:
    def test_hold_the_last_and_the_best_epoch_over_resumes_and_in_a_copy(self, monkeypatch):
        accuracies = iter([0.3, 0.6, 0.5, 0.6, 0.7, 0.2])
        monkeypatch.setattr(CrossEntropy, "validation_step", lambda self, batch, _: None)
        monkeypatch.setattr(
            CrossEntropy, "on_validation_epoch_end", lambda self: self.log("test/acc", next(accuracies))
        )
        words = ["--trainer.num_sanity_val_steps", "0"]
        folder, seen = FIRST / "checkpoints", []
        for number in range(1, 7):
            if number == 4:
                shutil.move("here", "moved")
                words += ["--trainer.default_root_dir", "moved"]
                folder = Path("moved", *folder.parts[1:])
            main(epochs(number, *words, *(["--ckpt_path", "last"] if number > 1 else [])))
            held = {path.name: torch.load(path, weights_only=True)["epoch"] for path in folder.iterdir()}
            seen.append((held.pop("last.ckpt"), held.pop("best.ckpt")))
            assert not held, "one more checkpoint"
        assert seen == [(0, 0), (1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]

    def test_are_those_of_the_users_callback_over_resumes(self):
        one = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k", "1"]
        main(epochs(1, *one))
        main(epochs(2, *one, "--ckpt_path", "last"))
        main(epochs(3, *one, "--ckpt_path", "last"))
        assert [path.name for path in FIRST.rglob("*.ckpt")] == ["epoch=2-step=9.ckpt"]

    def test_of_an_earlier_run_in_the_same_directory_stay(self):
        plain = ["--trainer.logger", "false"]
        main(epochs(1, *plain))
        before = {path.name: path.read_bytes() for path in Path("here/checkpoints").iterdir()}
        main(epochs(2, *plain))
        assert {path.name for path in Path("here/checkpoints").iterdir()} == {
            "last.ckpt", "best.ckpt", "last-v1.ckpt", "best-v1.ckpt",
        }  # fmt: skip
        assert all(Path("here/checkpoints", name).read_bytes() == content for name, content in before.items())


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
        monkeypatch.setattr("sanm_lightning.run.relaunch.SLURMEnvironment.detect", lambda: True)
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
    main(epochs(2, "--ckpt_path", str(FIRST / "checkpoints" / "last.ckpt")))
    assert results(FIRST)["epochs"] == 1
    assert results(FIRST.parent / "version_1")["epochs"] == 2


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (("version_2", "version_10"), "version_10"),  # the older one has more steps
        (("run7", "run12"), "run12"),
        (("abzc1xyz", "k9x7q2ab"), "abzc1xyz"),  # ids, as of WandbLogger: the one of more steps
        (("xyz1", "abc9"), "xyz1"),
    ],
)
def test_the_newest_run_is_that_of_the_highest_number_or_without_numbers_of_most_steps(names, newest, tmp_path):
    for name, steps in zip(names, (90, 10), strict=True):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        torch.save({"global_step": steps}, tmp_path / name / "checkpoints/last.ckpt")
    logger = SimpleNamespace(save_dir=str(tmp_path.parent), name=tmp_path.name)
    run = SimpleNamespace(loggers=[logger], default_root_dir=str(tmp_path), checkpoint_callbacks=[], callbacks=[])
    assert resolve_ckpt_path(run, "last", fitting=False) == str(tmp_path / newest / "checkpoints/last.ckpt")
