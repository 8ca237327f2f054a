"""SANM as a base class: options, checkpoints and callbacks are the module's own."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.mixin import SANMMixin

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*does not have many workers", "ignore:Checkpoint directory .* exists"
)


class Plain(L.LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.cnn(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mine(SANMMixin, Plain):
    def __init__(self, width: int = 6, sanm_network: str = "cnn", **options: Any) -> None:
        super().__init__(width, sanm_network=sanm_network, **options)
        self.save_hyperparameters()


def fit(module: Any, *callbacks: Any, epochs: int = 2, ckpt: Any = None) -> L.Trainer:
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(12, 3, 8, 8, generator=draw), torch.arange(12) % 3)
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=saving,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 4), ckpt_path=ckpt)
    return trainer


def hidden(trainer: L.Trainer) -> float:
    return float(trainer.callback_metrics.get("train/masked_fraction", 0))


def test_options_go_to_sanm_and_all_other_arguments_to_the_next_base() -> None:
    class Own(SANMMixin, Plain):
        pass

    module = Own(5, sanm=SANM(mu=0.4), sanm_network="cnn")
    assert module.sanm.mu == 0.4
    assert module.cnn[0].out_channels == 5
    assert Own().sanm.mu == SANM().mu
    assert Own(sanm={"mu": 0.2}).sanm.mu == 0.2
    with pytest.raises(ValueError, match="mu in"):
        Own(sanm={"mu": 2})


def test_the_module_owns_the_decoder_and_a_plain_strict_load_brings_it_back(tmp_path: Path) -> None:
    module = Mine(5, sanm=SANM(mu=0.4, ratio="fixed"))
    fit(module, ModelCheckpoint(tmp_path, "last"))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert any(name.startswith("decoder.") for name in state["sanm"]["state_dict"])
    assert "sanm" not in state["callbacks"]["SANMCallback"]
    loaded = Mine.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (loaded.sanm.mu, loaded.sanm.ratio, loaded.hparams["width"]) == (0.4, "fixed", 5)
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, loaded.state_dict()[name]), name
    assert hidden(fit(loaded)) > 0


def test_hyper_parameters_are_plain_python_and_a_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    def run(ckpt: Any = None) -> Mine:
        L.seed_everything(1, verbose=False)
        module = Mine(sanm=SANM(mu=0.4, seed=2))
        fit(module, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), epochs=3, ckpt=ckpt)
        return module

    whole = run()
    assert isinstance(whole.hparams["sanm"], dict)
    resumed = run(tmp_path / "epoch=1.ckpt")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("asks", [False, True])
def test_a_class_with_callbacks_of_its_own_has_sanm_too_and_once(asks: bool) -> None:
    class Own(Mine):
        def configure_callbacks(self) -> list[Any]:
            return [L.pytorch.callbacks.Timer(), *(super().configure_callbacks() if asks else [])]

    class Child(Own):
        pass

    for kind in (Own, Child):
        trainer = fit(kind())
        assert [type(c).__name__ for c in trainer.callbacks if "Timer" in repr(c) or isinstance(c, SANMCallback)] == [  # type: ignore[attr-defined]
            "Timer",
            "SANMCallback",
        ]
        assert hidden(trainer) > 0


def test_a_callback_of_the_trainer_gives_way_to_the_modules_own() -> None:
    module, other = Mine(), SANMCallback()
    trainer = fit(module, other)
    assert [c.sanm for c in trainer.callbacks if isinstance(c, SANMCallback)] == [module.sanm]  # type: ignore[attr-defined]
    assert other.sanm.decoder is None


def test_a_name_of_the_users_own_is_not_taken_for_an_option() -> None:
    module = Mine()
    module.warmup_epochs = 5  # of the learning rate, say
    assert hidden(fit(module)) > 0
    assert hidden(fit(Mine(sanm=SANM(warmup_epochs=2)))) == 0


def test_the_network_layer_and_size_can_be_named() -> None:
    class Own(SANMMixin, Plain):
        pass

    module = Own(sanm_network="cnn", sanm_layer="1", sanm_image_size=(8, 8))
    assert hidden(fit(module)) > 0
    assert module.sanm.decoder is not None
    assert module.sanm.decoder.shape == (6, 4, 4)


def test_a_sanm_of_two_modules_is_refused_when_the_first_is_fitted() -> None:
    sanm = SANM(mu=0.5, reconstruct=False)
    first, second = Mine(sanm=sanm), Mine(sanm=sanm)
    fit(pickle.loads(pickle.dumps(copy.deepcopy(second))), epochs=1)
    with pytest.raises(
        ValueError, match="no other module uses, got one that was given to another module as well; create a"
    ):
        fit(first, epochs=1)


def test_a_sanm_of_another_module_is_refused() -> None:
    sanm = SANM(mu=0.5, reconstruct=False)
    fit(Mine(sanm=sanm), epochs=1)
    with pytest.raises(ValueError, match="expected a SANM that no other module uses, got one that is built for a"):
        Mine(sanm=sanm)
