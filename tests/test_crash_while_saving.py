"""A crash or a full disk while saving costs what was being saved, never what was there before."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import main
from sanm_lightning.run.record import write_json
from sanm_lightning.safe_files import AtomicCheckpointIO, atomic_write, read_checkpoint
from tests.methods.toy import data, method, trainer
from tests.test_cli import SMALL, TOY, typed

RESUMED = ["fit", *SMALL, *TOY, "--ckpt_path", "a.ckpt"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


def checkpoint(**options) -> bytes:
    """Write a.ckpt here; return its bytes."""
    run = trainer(1, plugins=[AtomicCheckpointIO()])
    run.fit(method(warmup_epochs=10, **options), data())
    run.save_checkpoint("a.ckpt")
    return Path("a.ckpt").read_bytes()


def said(monkeypatch, capsys, *words: str) -> str:
    """Type a command that must be refused; return the sentence."""
    with pytest.raises(SystemExit) as end:
        typed(monkeypatch, *words)
    assert end.value.code == 2
    sentence = capsys.readouterr().err.split("sanm: ", 1)[1]
    assert "Traceback" not in sentence
    assert sentence.count("\n") == 2  # itself, and where to see more
    return sentence


class Executed:
    """What a hostile file would like to do."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.skipif(sys.platform == "win32", reason="has no file-size limit")
def test_a_full_disk_leaves_the_old_files_and_no_litter(tmp_path):
    """In a process of its own: a file-size limit cannot be lifted again."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        import torch
        from sanm_lightning.data import Toy
        from sanm_lightning.run.record import write_json
        from sanm_lightning.safe_files import AtomicCheckpointIO

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        saving, toy = AtomicCheckpointIO(), Toy(num_samples=5000)
        def attempts(size):
            held = {"state_dict": {"weight": torch.zeros(size)}, "epoch": 0, "global_step": 0}
            yield lambda: saving.save_checkpoint(held, "a.ckpt")
            yield lambda: write_json(Path("results.json"), {"text": "x" * size})
            yield lambda: toy.save_labels("labels.npz")
        for attempt in attempts(10):
            attempt()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for attempt in attempts(10**5):
            try:
                attempt()
            except OSError as error:
                print(error)
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    run = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    sentences = run.stdout.splitlines()
    assert [sentence.split(" ")[5] for sentence in sentences] == ["'a.ckpt'", "'results.json'", "'labels.npz'"]
    assert all("(File too large), whose previous content is unchanged; free disk space" in s for s in sentences)
    assert sorted(os.listdir(tmp_path)) == ["a.ckpt", "labels.npz", "results.json"]
    assert len(read_checkpoint("a.ckpt")["state_dict"]["weight"]) == 10
    assert json.loads(Path("results.json").read_text()) == {"text": "x" * 10}


def test_a_name_is_taken_when_the_file_is_complete(tmp_path):
    Path("a").write_bytes(b"old")
    with atomic_write("a") as file:
        file.write(b"n")
        file.flush()
        assert Path("a").read_bytes() == b"old"
    assert Path("a").read_bytes() == b"n"
    with pytest.raises(KeyboardInterrupt), atomic_write("a") as file:
        raise KeyboardInterrupt
    assert os.listdir() == ["a"]
    assert Path("a").read_bytes() == b"n"


def test_the_line_saves_so_unless_told_otherwise():
    assert isinstance(main(["fit", *SMALL, *TOY]).trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    asynchronous = "lightning.pytorch.plugins.io.AsyncCheckpointIO"
    cli = main(["fit", *SMALL, *TOY, "--trainer.plugins+=" + asynchronous])
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"


class TestCheckpointErrors:
    def test_truncated_at_ten_places(self, monkeypatch, capsys):
        good = checkpoint()
        for tenth in range(10):
            part = good[: len(good) * tenth // 10]
            Path("a.ckpt").write_bytes(part)
            with pytest.raises(ValueError, match=r"expected a checkpoint.*'a\.ckpt'.*resume from another"):
                trainer(2, plugins=[AtomicCheckpointIO()]).fit(method(), data(), ckpt_path="a.ckpt")
            assert Path("a.ckpt").read_bytes() == part
        assert "'a.ckpt'" in said(monkeypatch, capsys, *RESUMED)

    def test_a_pickle_payload_is_not_executed(self, monkeypatch, capsys):
        torch.save({"state_dict": {}, "epoch": 0, "global_step": 0, "x": Executed()}, "a.ckpt")
        assert "contains other objects, none of which was loaded" in said(monkeypatch, capsys, *RESUMED)
        Path("a.ckpt").write_bytes(pickle.dumps(Executed()))
        assert "damaged or" in said(monkeypatch, capsys, *RESUMED)  # which of two sentences depends on the torch
        assert not Path("executed").exists()
        pickle.loads(Path("a.ckpt").read_bytes())
        assert Path("executed").exists()  # it would have been

    def test_no_checkpoint_at_all(self, monkeypatch, capsys):
        torch.save({"weight": torch.zeros(2)}, "a.ckpt")
        assert "without state_dict, epoch, global_step" in said(monkeypatch, capsys, *RESUMED)
        Path("a.ckpt").write_text("epoch: 3\n")
        assert "'a.ckpt'" in said(monkeypatch, capsys, *RESUMED)
        os.remove("a.ckpt")
        with pytest.raises(FileNotFoundError, match="got no such file; check --ckpt_path"):
            read_checkpoint("a.ckpt")
        os.mkdir("a.ckpt")
        assert "got a folder without checkpoints; check --ckpt_path" in said(monkeypatch, capsys, *RESUMED)
        Path("a.ckpt/checkpoints").mkdir()
        Path("a.ckpt/checkpoints/best.ckpt").touch()
        assert "got a folder; use 'a.ckpt/checkpoints/best.ckpt'" in said(monkeypatch, capsys, *RESUMED)
        Path("a.ckpt/checkpoints/last.ckpt").touch()
        assert "got a folder; use 'a.ckpt/checkpoints/last.ckpt'" in said(monkeypatch, capsys, *RESUMED)
        shutil.rmtree("a.ckpt")
        assert "a.ckpt" in said(monkeypatch, capsys, *RESUMED)

    def test_of_another_method_number_of_classes_or_network(self):
        from sanm_lightning.methods import CDR, CrossEntropy

        good = checkpoint()
        small = {"image_size": (16, 16), "network": "small_cnn"}
        for module, source, message in (
            (
                CDR(4, noise_rate=0.5, network_args={"width": 4}, **small),
                data(),
                "expected a checkpoint of CDR with 4.*CrossEntropy",
            ),
            (
                CrossEntropy(5, network_args={"width": 4}, **small),
                data(num_classes=5),
                "CrossEntropy with 5 classes.*4",
            ),
            (CrossEntropy(4, network_args={"width": 8}, **small), data(), "expected the weights of CrossEntropy"),
        ):
            with pytest.raises(ValueError, match=message) as error:
                trainer(2).fit(module, source, ckpt_path="a.ckpt")
            assert "\n" not in str(error.value)
        assert Path("a.ckpt").read_bytes() == good
        trainer(2).fit(method(warmup_epochs=10), data(), ckpt_path="a.ckpt")


def trained(*_):
    raise AssertionError("the training has begun")


class TestRunDirectory:
    def test_a_file_in_its_place_is_told_before_training(self, monkeypatch, capsys):
        Path("here").write_text("a file")
        monkeypatch.setattr("sanm_lightning.CrossEntropy.training_step", trained)
        for place in ("here", "here/below"):
            words = ["fit", *SMALL, *TOY, "--trainer.default_root_dir", place]
            assert f"expected a folder for the run in '{place}" in said(monkeypatch, capsys, *words)

    def test_a_file_in_the_place_of_the_checkpoints_is_told_before_training(self, monkeypatch, capsys):
        Path("kept").write_text("a file")
        monkeypatch.setattr("sanm_lightning.CrossEntropy.training_step", trained)
        at = TOY.index("--trainer.enable_checkpointing")
        words = [*TOY[:at], *TOY[at + 2 :], "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=kept"]
        assert "kept'; choose another folder" in said(monkeypatch, capsys, "fit", *SMALL, *words)
        assert Path("kept").read_text() == "a file"


def test_a_failed_write_names_the_file(tmp_path):
    Path("file").write_text("")
    with pytest.raises(
        OSError, match=r"expected a writable file, got 'file/results\.json' \([^)]+\); choose another folder$"
    ):
        write_json(Path("file/results.json"), {})
