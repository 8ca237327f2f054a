"""Strategies that share out weights are refused before training, whichever way SANM came in; DDP is tested in tests/methods."""

import lightning as L
import pytest
import pytorch_lightning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from sanm_lightning import SANMCallback, SANMMixin
from sanm_lightning.sanm.checks import require_whole_weights
from tests.methods.toy import data, method, trainer


class Alone(FSDPStrategy):
    """FSDP as far as the hook that refuses it: no processes, no device."""

    def setup_environment(self):
        pass


class Step(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))

    def training_step(self, batch, batch_idx):
        raise AssertionError("training has begun")

    def configure_optimizers(self):
        raise AssertionError("training has begun")


class Mixed(SANMMixin, Step):
    pass


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
@pytest.mark.parametrize(
    ("module", "callbacks"),
    [(method(), []), (Mixed(), []), (Step(), [SANMCallback()])],
    ids=["method without SANM", "mixin", "callback"],
)
def test_fsdp_is_refused_in_a_sentence(module, callbacks):
    run = trainer(1, strategy=Alone(), callbacks=callbacks)
    with pytest.raises(
        MisconfigurationException, match=r"expected a strategy without sharded weights .*, got Alone; .*strategy ddp"
    ):
        run.fit(module, data())


@pytest.mark.parametrize(
    "kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, pytorch_lightning.strategies.FSDPStrategy]
)
def test_every_strategy_of_that_kind_is_refused_and_ddp_is_not(kind):
    class Run:
        strategy = kind.__new__(kind)

    with pytest.raises(MisconfigurationException, match=kind.__name__):
        require_whole_weights(Run(), Step())
    Run.strategy = DDPStrategy()
    require_whole_weights(Run(), Step())
