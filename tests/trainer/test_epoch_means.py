"""The means that are logged once per epoch are those that a call of ``log`` in every step gives."""

import lightning as L
import pytest
import torch

from sanm_lightning import SANM, SANMCallback
from sanm_lightning.data import Toy
from sanm_lightning.models.small_cnn import SmallCNN
from tests.methods.toy import data, method, trainer

NAMES = ("loss", "quality", "masked_fraction", "reconstruction_loss", "classification_loss")


class EveryStep(L.Callback):
    """Log the same values in every step, and note both in ``on_train_epoch_end``."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        sanm = pl_module.sanm
        figures = {name: sanm.last[name] for name in NAMES if name in sanm.last}
        loss = outputs["loss"] * trainer.accumulate_grad_batches
        term = sanm.beta * figures["reconstruction_loss"] if "reconstruction_loss" in figures else 0.0
        figures |= {"classification_loss": loss - term}
        for name, value in figures.items():
            pl_module.log(f"step/{name}", value, on_step=False, on_epoch=True, batch_size=1)
        pl_module.log("step/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.images))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize(
    "options",
    [{}, {"max_steps": 6}, {"accumulate_grad_batches": 2}, {"limit_train_batches": 3}],
    ids=["epochs", "steps", "accumulated", "limited"],
)
def test_they_are_read_at_the_end_of_an_epoch_by_callbacks_in_any_order(options):
    noted = EveryStep()
    options = {"epochs": -1 if "max_steps" in options else 2, **options}
    trainer(callbacks=[noted], **options).fit(
        method(sanm=SANM(mu=0.5)), data(num_samples=37, num_test_samples=8, batch_size=8)
    )
    assert len(noted.epochs) == 2
    for number, epoch in enumerate(noted.epochs):
        found = {name.removeprefix("step/") for name in epoch if name.startswith("step/")}
        assert found == (set(NAMES) if number else {"loss", "classification_loss"})
        for name in found:
            assert epoch[f"train/{name}"] == pytest.approx(epoch[f"step/{name}"], rel=1e-5)
    assert noted.epochs[1]["train/masked_fraction"] > 0


class Stop(L.Callback):
    """Ask the trainer to stop, or raise, in the second step of an epoch."""

    def __init__(self, epoch, error=None):
        self.epoch, self.error = epoch, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            trainer.should_stop = True
            if self.error is not None:
                raise self.error


def test_an_epoch_that_is_stopped_has_the_mean_of_its_steps():
    noted = EveryStep()
    trainer(callbacks=[Stop(1), noted], min_epochs=1).fit(method(sanm=SANM(mu=0.5)), data(num_samples=37, batch_size=8))
    assert len(noted.epochs) == 2
    assert noted.epochs[1]["train/loss"] == pytest.approx(noted.epochs[1]["step/loss"], rel=1e-5)


class StopInValidation(L.Callback):
    """Ask the trainer to stop at the end of the first validation, as ``EarlyStopping`` does."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.parametrize("stops", [True, False])
def test_validations_within_an_epoch_leave_its_means_unchanged(stops):
    noted = EveryStep()
    others = [noted, *([StopInValidation()] if stops else [])]
    run = trainer(1, callbacks=others, val_check_interval=2, min_epochs=0)
    run.fit(method(), data(num_samples=37, num_test_samples=8, batch_size=8))
    assert run.global_step == (2 if stops else 5)
    assert noted.epochs[0]["train/loss"] == pytest.approx(noted.epochs[0]["step/loss"], rel=1e-5)


def test_the_losses_of_an_interrupted_epoch_are_not_those_of_the_next_fit():
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = SmallCNN(num_classes=4, width=4)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def made() -> Plain:
        torch.manual_seed(0)
        return Plain()

    def fit(module: Plain, sanm: SANMCallback, *others: L.Callback) -> float:
        run = trainer(1, callbacks=[sanm, *others])
        run.fit(module, Toy(num_samples=32, num_test_samples=8, batch_size=8, track_test=False))
        return float(run.callback_metrics["train/classification_loss"])

    sanm, module = SANMCallback(SANM(seed=0)), made()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(module, sanm, Stop(0, RuntimeError("stopped")))
    assert fit(module, sanm) == pytest.approx(fit(made(), SANMCallback(SANM(seed=0))))
