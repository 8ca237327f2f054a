"""A setting that is given together with a checkpoint is honoured, or refused in a sentence that names it."""

import shutil
import sys
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from sanm_lightning.cli import main
from sanm_lightning.methods import CrossEntropy
from sanm_lightning.methods.schedules import LinearAfter
from tests.methods.test_every_method import AtStep
from tests.methods.toy import data, method, trainer
from tests.test_cli import SMALL, TOY, typed

RUN = [
    *SMALL, *TOY, "--model.optimizer", "SGD", "--model.optimizer.lr", "0.01", "--seed_everything", "7",
    "--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.5", "--model.warmup_epochs", "0",
]  # fmt: skip
ON = ["--ckpt_path", "run.ckpt", "--trainer.max_epochs", "2"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One epoch of RUN."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sanm"])
        patch.chdir(folder)
        main(["fit", *RUN]).trainer.save_checkpoint("run.ckpt")
    return folder / "run.ckpt"


@pytest.fixture
def _here(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "run.ckpt")


@pytest.mark.usefixtures("_here")
class TestGivenWithACheckpoint:
    def test_the_same_command_goes_on(self):
        cli = main(["fit", *RUN, *ON])
        assert cli.trainer.current_epoch == 2
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01

    def test_what_is_left_out_is_the_checkpoints(self):
        source = RUN[RUN.index("--data") : RUN.index("--model.optimizer")]
        noise = ["--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.5"]
        cli = main(["fit", "--model", "CrossEntropy", *source, *noise, *ON])
        assert cli.model.warmup_epochs == 0
        assert cli.config.fit.seed_everything == 7
        assert cli.datamodule.seed == 7

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["--model.optimizer.lr", "0.5"], "model.optimizer.lr 0.5"),
            (["--model.scheduler", "OneCycle", "--model.scheduler.max_lr", "1"], "model.scheduler"),
            (["--model.network_args", "{width: 8}"], "model.network_args {'width': 8}"),
            (["--model.sanm", "SANM"], "model.sanm"),
            (["--model", "CDR"], "model 'sanm_lightning.CDR'"),
            (["--seed_everything", "8"], "seed_everything 8"),
            (["--data.batch_size", "8"], "data.batch_size 8"),
            (["--data.noise.rate", "0.25"], "data.noise"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_another_one_is_refused_by_name(self, monkeypatch, capsys, words, named):
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", *RUN, *ON, *words)
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert named in said
        assert "the checkpoint" in said
        assert "Traceback" not in said

    def test_more_epochs_and_more_workers_are_honoured(self):
        cli = main(["fit", *RUN, *ON, "--data.eval_batch_size", "3", "--trainer.max_epochs", "3"])
        assert cli.trainer.current_epoch == 3
        assert cli.datamodule.eval_batch_size == 3

    def test_another_trainer_is_told(self):
        with pytest.warns(UserWarning, match=r"accumulate_grad_batches 1 -> 2"):
            cli = main(["fit", *RUN, *ON, "--trainer.accumulate_grad_batches", "2"])
        assert cli.trainer.accumulate_grad_batches == 2

    def test_a_trained_model_is_evaluated_on_other_data_but_not_with_another_network(self, monkeypatch, capsys):
        trained = ["--ckpt_path", "run.ckpt", "--data.batch_size", "5"]
        toy = [word for word in TOY if word not in ("--trainer.max_epochs", "1")]
        main(["test", *SMALL, *toy, *trained])
        with pytest.raises(SystemExit):
            typed(monkeypatch, "test", "--model", "CrossEntropy", "--model.network_args", "{width: 9}", *toy, *trained)
        assert "model.network_args {'width': 9}" in capsys.readouterr().err

    def test_the_keyword_last_compares_too(self, monkeypatch, capsys):
        at = RUN.index("--trainer.enable_checkpointing")
        saving = RUN[:at] + RUN[at + 2 :]
        saving += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
        saving += ["--trainer.callbacks.dirpath=kept"]
        main(["fit", *saving])
        last = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", *saving, *last, "--model.optimizer.lr", "0.5")
        assert end.value.code == 2
        assert "model.optimizer.lr 0.5" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["sanm"])
        assert main(["fit", *saving, *last]).trainer.current_epoch == 2

    def test_a_resumed_runs_checkpoint_remembers_the_settings(self):
        cli = main(["fit", "--model", "CrossEntropy", *RUN[RUN.index("--data") :], *ON])
        cli.trainer.save_checkpoint("again.ckpt")
        first, second = (torch.load(name, weights_only=True)["settings"] for name in ("run.ckpt", "again.ckpt"))
        assert second["model"] == first["model"]
        assert second["seed_everything"] == first["seed_everything"] == 7
        assert second["trainer"]["max_epochs"] == 2


def test_a_schedule_that_follows_the_trainers_length_is_not_stretched(tmp_path):
    from sanm_lightning.methods.schedules import Cosine

    run = trainer(2)
    run.fit(method(scheduler=Cosine), data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a training of 8 steps.*got 16"):
        trainer(4).fit(method(scheduler=Cosine), data(), ckpt_path=tmp_path / "a.ckpt")
    loaded = CrossEntropy.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded.scheduler = Cosine
    trainer(1).fit(loaded, data())  # a new training is as long as it likes
    trainer(2).fit(loaded, data())


@pytest.mark.parametrize(("stop", "lengthened"), [(1, True), (3, False)], ids=["before the decay", "in the decay"])
def test_linear_after_is_lengthened_before_its_decay(tmp_path, stop, lengthened):
    """The rates are those of a training that was planned with the new length."""

    class Rates(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def decaying():
        return method(scheduler=partial(LinearAfter, start=0.5))

    planned, resumed = Rates(), Rates()
    trainer(8, callbacks=[planned]).fit(decaying(), data())
    run = trainer(4, callbacks=[AtStep(4 * stop, tmp_path / "a.ckpt")])
    run.fit(decaying(), data())
    again = trainer(8, callbacks=[resumed])
    if not lengthened:
        with pytest.raises(
            ValueError, match=r"a training of 16 steps.*got 32; .* --weights FILE instead of --ckpt_path"
        ):
            again.fit(decaying(), data(), ckpt_path=tmp_path / "a.ckpt")
        return
    again.fit(decaying(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.seen == {step: rate for step, rate in planned.seen.items() if step >= 4 * stop}
    assert planned.seen[31] < planned.seen[15] == planned.seen[0], "the decay lies in the resumed part"
