"""The random stream of an accelerator, which dropout uses there, continues in a resumed run."""

import lightning as L
import pytest
import torch

from sanm_lightning.callbacks import exact_resume
from tests.methods.toy import data, method, trainer


class Accelerator:
    """Random stream of an accelerator, as the module ``torch.cuda`` offers it."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def get_rng_state(self):
        return self.generator.get_state()

    def set_rng_state(self, state):
        self.generator.set_state(state)


class Dropout(L.Callback):
    """Draw from the accelerator's stream in every step, and save a checkpoint in the middle of an epoch."""

    def __init__(self, accelerator, path=None):
        self.accelerator, self.path, self.drawn = accelerator, path, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn[trainer.global_step] = float(torch.rand((), generator=self.accelerator.generator))

    def on_train_batch_end(self, trainer, *_):
        if self.path is not None and trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def on(monkeypatch):
    def use(accelerator):
        monkeypatch.setattr(exact_resume, "_accelerator", lambda module: accelerator)
        return accelerator

    return use


def draws(accelerator, path, **options):
    dropout = Dropout(accelerator, None if options else path)
    trainer(3, callbacks=[dropout]).fit(method(), data(track_test=False), **options)
    return dropout.drawn


def test_the_stream_of_the_accelerator_continues(on, tmp_path):
    path = tmp_path / "middle.ckpt"
    whole = draws(on(Accelerator(1)), path)
    resumed = draws(on(Accelerator(2)), path, ckpt_path=path)
    assert sorted(resumed) == list(range(6, 12))
    assert resumed == {step: whole[step] for step in resumed}
    assert len(set(whole.values())) == 12


@pytest.mark.parametrize("saved_on_accelerator", [True, False])
def test_a_run_continues_on_another_kind_of_device(saved_on_accelerator, on, tmp_path):
    path, there, here = tmp_path / "middle.ckpt", Accelerator(1), Accelerator(2)
    on(there if saved_on_accelerator else None)
    draws(there, path)
    on(None if saved_on_accelerator else here)
    before = Accelerator(2)
    assert draws(here, path, ckpt_path=path) == {
        step: float(torch.rand((), generator=before.generator)) for step in range(6, 12)
    }
