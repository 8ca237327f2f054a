"""Checkpoints of a module with and without SANM: each loads into the other, and training goes on."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.foreign_checkpoint import add_to_optimizer_states, split_from_optimizer_states
from tests.sanm.test_callback import CLASSES, SANMMixin, assert_same, fit, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory .* exists"
)


class Plain(L.LightningModule):
    """A module that passes further arguments on, as many do."""

    def __init__(self, width: int = 6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.cnn(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        rest = [parameter for name, parameter in self.named_parameters() if not name.startswith("cnn.4")]
        groups: list[dict[str, Any]] = [{"params": self.cnn[4].parameters(), "lr": 0.02}, {"params": rest}]
        return torch.optim.Adam(groups, lr=0.01)


class Mine(SANMMixin, Plain):
    def __init__(self, width: int = 6, sanm_network: str = "cnn", **options: Any) -> None:
        super().__init__(width, sanm_network=sanm_network, **options)
        self.save_hyperparameters()


def made(kind: str) -> tuple[Any, list[Any], Any]:
    """Return a module, its callbacks and its SANM, with the same weights for every kind."""
    sanm = SANM(mu=0.4, seed=2)
    torch.manual_seed(1)
    module = Mine(5, sanm=sanm) if kind == "mixin" else Plain(5)
    callbacks = [SANMCallback(sanm, network="cnn")] if kind == "callback" else []
    return module, callbacks, None if kind == "plain" else sanm


def saved(kind: str, folder: Path, epochs: int = 2, **options: Any) -> tuple[Any, Any, Path]:
    module, callbacks, sanm = made(kind)
    fit(module, *callbacks, ModelCheckpoint(folder, kind, **options), epochs=epochs)
    return module, sanm, folder / f"{kind}.ckpt"


def moments(trainer: Any, module: Any) -> dict[str, Tensor]:
    """First moments of Adam for the weights of the network."""
    state = trainer.optimizers[0].state
    return {name: state[parameter]["exp_avg"].clone() for name, parameter in module.cnn.named_parameters()}


class TestLoading:
    @pytest.mark.parametrize("weights_only", [False, True])
    @pytest.mark.parametrize("kind", ["mixin", "callback"])
    def test_a_checkpoint_under_sanm_loads_into_the_plain_class(
        self, kind: str, weights_only: bool, tmp_path: Path
    ) -> None:
        module, _, file = saved(kind, tmp_path, save_weights_only=weights_only)
        loaded = Plain.load_from_checkpoint(file, weights_only=True)
        assert loaded.hparams == {"width": 5}
        assert_same(weights(module), weights(loaded))

    def test_a_plain_checkpoint_loads_into_the_class_with_the_mixin(self, tmp_path: Path) -> None:
        module, _, file = saved("plain", tmp_path)
        loaded = Mine.load_from_checkpoint(file, sanm=SANM(mu=0.2), weights_only=True)
        assert loaded.sanm.mu == 0.2
        assert_same(weights(module), weights(loaded))

    def test_options_and_state_are_restored_where_none_are_given(self, tmp_path: Path) -> None:
        module, sanm, file = saved("mixin", tmp_path)
        loaded = Mine.load_from_checkpoint(file, weights_only=True)
        assert (loaded.sanm.mu, loaded.sanm._steps, loaded.hparams["width"]) == (0.4, sanm._steps, 5)
        assert loaded.hparams["sanm"] == sanm.options
        assert_same(weights(module, sanm.decoder), weights(loaded, loaded.sanm.decoder))
        assert Mine.load_from_checkpoint(file, sanm=SANM(mu=0.1)).sanm.mu == 0.1

    def test_the_arguments_of_the_mixin_are_restored(self, tmp_path: Path) -> None:
        class Bare(SANMMixin, Plain):
            pass

        module = Bare(sanm_network="cnn", sanm_rehearse=False, sanm_mean=0.0, sanm_std=1.0)
        fit(module, ModelCheckpoint(tmp_path, "bare"), epochs=1)
        loaded = Bare.load_from_checkpoint(tmp_path / "bare.ckpt", weights_only=True)
        assert loaded._sanm_options == module._sanm_options

    def test_a_class_that_requires_an_option_of_sanm_gets_it_from_the_hyper_parameters(self, tmp_path: Path) -> None:
        class Required(SANMMixin, Plain):
            def __init__(self, sanm: Any, width: int = 6) -> None:
                super().__init__(width, sanm=sanm, sanm_network="cnn")
                self.save_hyperparameters()

        fit(Required(SANM(mu=0.1)), ModelCheckpoint(tmp_path, "required"), epochs=1)
        assert Required.load_from_checkpoint(tmp_path / "required.ckpt", weights_only=True).sanm.mu == 0.1

    def test_own_hooks_without_super_change_nothing(self, tmp_path: Path) -> None:
        class Own(Mine):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["mine"] = 1

            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                self.found = checkpoint["mine"]

        module = Own(sanm={"mu": 0.2})
        fit(module, ModelCheckpoint(tmp_path, "own"), epochs=1)
        loaded = Own.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
        assert (loaded.found, loaded.sanm.mu) == (1, 0.2)
        assert_same(weights(module, module.sanm.decoder), weights(loaded, loaded.sanm.decoder))
        assert_same(weights(Plain.load_from_checkpoint(tmp_path / "own.ckpt")), weights(module))

    def test_a_checkpoint_of_an_earlier_version_loads(self, tmp_path: Path) -> None:
        """State and options of SANM were among those of the module, and the decoder's moments in the optimizer."""
        module, sanm, file = saved("mixin", tmp_path)
        state = torch.load(file, weights_only=True)
        old = state.pop("sanm")
        state["state_dict"].update({f"sanm.{name}": value for name, value in old["state_dict"].items()})
        state["hyper_parameters"].update(old["hyper_parameters"])
        removed = state["callbacks"]["SANMCallback"].pop("optimizer_states")
        add_to_optimizer_states(state["optimizer_states"], module.trainer.optimizers, sanm, removed)
        torch.save(state, tmp_path / "old.ckpt")
        loaded = Mine.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
        assert loaded.sanm.mu == 0.4
        assert_same(weights(module, sanm.decoder), weights(loaded, loaded.sanm.decoder))
        ends = []
        for ckpt in (file, tmp_path / "old.ckpt"):
            resumed, _, part = made("mixin")
            fit(resumed, ckpt=ckpt, epochs=3)
            ends.append(weights(resumed, part.decoder))
        assert_same(*ends)


class TestContinuing:
    @pytest.mark.parametrize("after", ["plain", "callback", "mixin"])
    @pytest.mark.parametrize("before", ["plain", "callback", "mixin"])
    def test_training_goes_on_with_weights_and_optimizer(self, before: str, after: str, tmp_path: Path) -> None:
        module, sanm, file = saved(before, tmp_path)
        expected = weights(module) | moments(module.trainer, module)
        resumed, callbacks, part = made(after)
        found: dict[str, Tensor] = {}

        class Noting(L.Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                found.update(weights(pl_module) | moments(trainer, pl_module))
                if part is not None and sanm is not None:
                    assert_same(weights(part.decoder), weights(sanm.decoder))
                    one, other = (
                        [t.optimizers[0].state[p]["exp_avg"] for p in s.decoder.parameters()]
                        for t, s in ((trainer, part), (module.trainer, sanm))
                    )
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

        trainer = fit(resumed, *callbacks, Noting(), ckpt=file, epochs=3)
        assert_same(found, expected)
        assert trainer.current_epoch == 3
        assert ("train/reconstruction_loss" in trainer.callback_metrics) is (after != "plain")

    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_under_sanm_it_ends_as_the_uninterrupted_run(self, kind: str, tmp_path: Path) -> None:
        whole, sanm, _ = saved(kind, tmp_path, epochs=4)
        _, _, file = saved(kind, tmp_path / "part")
        resumed, callbacks, part = made(kind)
        fit(resumed, *callbacks, ckpt=file, epochs=4)
        assert_same(weights(whole, sanm.decoder), weights(resumed, part.decoder))


class TestOptimizerStates:
    @pytest.mark.parametrize("named", [False, True])
    def test_are_split_and_joined_without_loss_wherever_the_part_is(self, named: bool) -> None:
        part, other = nn.Linear(2, 3), nn.Linear(3, 1)
        first = list({"a": other.weight, "b": part.weight}.items())
        second = list({"c": part.bias, "d": other.bias}.items())
        groups = [first, second] if named else [[p for _, p in first], [p for _, p in second]]
        optimizer = torch.optim.Adam([{"params": group, "lr": 0.1 * n} for n, group in enumerate(groups, 1)])  # type: ignore[dict-item]
        other(part(torch.ones(1, 2))).sum().backward()
        optimizer.step()
        before, state = optimizer.state_dict(), optimizer.state_dict()
        removed = split_from_optimizer_states([state], [optimizer], part)
        assert [group["params"] for group in state["param_groups"]] == [[0], [1]]
        assert torch.equal(state["state"][1]["exp_avg"], optimizer.state[other.bias]["exp_avg"])
        assert torch.equal(removed[0][0]["exp_avg"], optimizer.state[part.weight]["exp_avg"])
        if named:
            assert [group["param_names"] for group in state["param_groups"]] == [["a"], ["d"]]
        add_to_optimizer_states([state], [optimizer], part, removed)
        assert state["param_groups"] == before["param_groups"]
        assert all(state["state"][number] == before["state"][number] for number in range(4))

    def test_of_other_parameters_are_left_unchanged(self) -> None:
        part, other = nn.Linear(2, 3), nn.Linear(3, 1)
        optimizer = torch.optim.SGD([*part.parameters(), *other.parameters()], lr=0.1)
        for parameters in ([*part.parameters(), *other.parameters()], [part.weight]):
            state = torch.optim.SGD(parameters, lr=0.1).state_dict()
            expected = [list(group["params"]) for group in state["param_groups"]]
            add_to_optimizer_states([state], [optimizer], part, [])
            assert [group["params"] for group in state["param_groups"]] == expected
