"""A small version of ``kill_and_resume.py``, and the resumes that need no violence."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from sanm_lightning import SANM
from sanm_lightning.run.record import RunRecord
from sanm_lightning.safe_files import AtomicCheckpointIO
from tests.kill_and_resume import equal
from tests.methods.toy import data, method, trainer

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    """In a process of its own, which forks."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    small = ["--small", "--kills", "1", "--kills-of-two", "0", "--epochs", "2", "--methods", "CoTeaching"]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "kill_and_resume.py"), *small],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "1 kills" in run.stdout
    assert "all equal" in run.stdout


class Stop(L.Callback):
    """Send this process a SIGTERM, as a cluster does before it takes the machine away."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Samples(L.Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = trainer.current_epoch, batch.index.tolist()


halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)


def run(folder, *callbacks, track_test=True, **options):
    samples = Samples()
    record = RunRecord()
    fitting = trainer(
        3, plugins=[AtomicCheckpointIO()], callbacks=[record, samples, *callbacks], default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )  # fmt: skip
    module = method(SANM(seed=0), scheduler=halving)
    with contextlib.suppress(SystemExit):
        fitting.fit(module, data(track_test=track_test), **options)
    return fitting, module, samples.seen, record.accuracies


def the_same(one, other) -> bool:
    return not equal(one.state_dict(), other.state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.filterwarnings(  # the callback has Lightning look for a last checkpoint
    "ignore:.*was called without a model", "ignore:.*there is no last checkpoint available"
)
@pytest.mark.parametrize("step", [5, 7, 8], ids=["middle", "last step", "first step"])
def test_after_sigterm(whole, tmp_path, step):
    """Lightning ends the step in hand, says goodbye by an exception, and the callback saves."""
    _, _, first, _ = run(tmp_path, Stop(step), OnExceptionCheckpoint(tmp_path, "term"))
    assert max(first) == step + 1
    _, module, second, accuracies = run(tmp_path, ckpt_path=tmp_path / "term.ckpt")
    assert min(second) == step + 2
    assert first | second == whole[2]
    assert accuracies == whole[3]
    assert the_same(module, whole[1])


@pytest.mark.parametrize(
    ("saving", "name", "steps"),
    [
        ({"every_n_train_steps": 4, "filename": "a", "save_top_k": 1}, "a.ckpt", 8),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True, "filename": "a"}, "a.ckpt", 8),
        ({"every_n_train_steps": 3, "filename": "a"}, "a.ckpt", 6),
    ],
    ids=["last step of an epoch", "end of an epoch", "middle"],
)
def test_from_each_kind_of_checkpoint(whole, tmp_path, saving, name, steps):
    class Die(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 8:
                raise KeyError("power cut")

    with pytest.raises(KeyError, match="power cut"):
        run(tmp_path, ModelCheckpoint(tmp_path, **saving), Die())
    assert torch.load(tmp_path / name, weights_only=True)["global_step"] == steps
    again = ModelCheckpoint(tmp_path, **saving)
    _, module, seen, accuracies = run(tmp_path, again, ckpt_path=tmp_path / name)
    assert seen == {step: what for step, what in whole[2].items() if step > steps}
    assert accuracies == whole[3]
    assert the_same(module, whole[1])


@pytest.mark.parametrize("when", ["last step", "end"])
def test_from_the_very_last_checkpoint(whole, tmp_path, when):
    """What a run does after it: the last evaluation, the last evidence, the results."""
    saving = {"every_n_train_steps": 12} if when == "last step" else {"every_n_epochs": 1}
    saver = ModelCheckpoint(tmp_path, filename="a", **saving)
    run(tmp_path, saver)
    results = [json.loads((tmp_path / "results.json").read_text())]
    (tmp_path / "results.json").unlink()
    fitting, module, seen, accuracies = run(
        tmp_path, ModelCheckpoint(tmp_path, filename="a", **saving), ckpt_path=tmp_path / "a.ckpt"
    )
    results.append(json.loads((tmp_path / "results.json").read_text()))
    assert not seen
    assert fitting.current_epoch == 3
    assert accuracies == whole[3]
    assert the_same(module, whole[1])
    assert all(result.pop("seconds") > 0 and result.pop("timing") for result in results)
    assert results[0] == results[1]
    assert results[0]["quality_auc"] is not None


def test_from_the_last_step_of_an_epoch_without_evaluation(tmp_path):
    _, module, seen, _ = run(tmp_path, track_test=False)
    saving = {"every_n_train_steps": 8, "filename": "a"}
    run(tmp_path, ModelCheckpoint(tmp_path, **saving), track_test=False)
    again = ModelCheckpoint(tmp_path, **saving)
    _, resumed, rest, _ = run(tmp_path, again, track_test=False, ckpt_path=tmp_path / "a.ckpt")
    assert rest == {step: what for step, what in seen.items() if step > 8}
    assert the_same(module, resumed)
