"""What a module saves, restores and forgets: pre-trained weights, networks as arguments, labels of another training set."""

from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import SANM, SANMCallback
from sanm_lightning.functional import guided_mixup
from sanm_lightning.methods import PLC, CrossEntropy, JointOptim, MCorrection
from sanm_lightning.methods.reset import copy_reinitialized
from sanm_lightning.models import create_network
from tests.methods.toy import data, same, trainer

SMALL = {"num_classes": 4, "image_size": (16, 16), "network": "small_cnn", "network_args": {"width": 4}}


@pytest.fixture
def pretrained(tmp_path):
    """Weights of a network, and the arguments of a method that starts from them."""
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet", num_classes=4).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 4, "url": None, "hf_hub_id": None}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    return weights, {"num_classes": 4, "image_size": (32, 32), "network": "test_resnet", "network_args": options}


def test_a_reset_after_loading_restores_the_pretrained_weights(pretrained, tmp_path):
    weights, arguments = pretrained
    module = JointOptim(**arguments, warmup_epochs=1, update_epochs=1)
    run = trainer(3)
    run.fit(module, data(image_size=32))
    run.save_checkpoint(tmp_path / "first.ckpt")
    loaded = JointOptim.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True)
    assert same(loaded.network, module.network)
    again = trainer(4)
    again.fit(loaded, data(image_size=32), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    again.save_checkpoint(tmp_path / "second.ckpt")
    third = JointOptim.load_from_checkpoint(tmp_path / "second.ckpt", weights_only=True)
    for one in (module, loaded, third):
        name = "network.conv1.0.weight"
        assert not torch.equal(one.network.state_dict()[name], weights[name.removeprefix("network.")])
        one.reset()
        assert torch.equal(one.network.state_dict()[name], weights[name.removeprefix("network.")])


class WithBackbone(CrossEntropy):
    def __init__(self, backbone: nn.Module, num_classes: int = 4, **kwargs):
        super().__init__(num_classes, network=backbone, **kwargs)


def backbone() -> nn.Module:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 4))


def test_a_network_that_is_an_argument_of_a_subclass_is_not_saved(tmp_path):
    module = WithBackbone(backbone(), image_size=16)
    run = trainer(1)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "own.ckpt")
    assert "backbone" not in torch.load(tmp_path / "own.ckpt", weights_only=True)["hyper_parameters"]
    again = WithBackbone.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True, backbone=backbone())
    assert same(again.network, module.network)
    resumed = WithBackbone(backbone(), image_size=16)
    trainer(2).fit(resumed, data(), ckpt_path=tmp_path / "own.ckpt")
    assert resumed.current_epoch == 2


@pytest.mark.parametrize("options", [{"mean": (0.5,) * 3}, {"std": (0.2,) * 3}, {"network_args": {"width": 4}}])
def test_options_of_networks_by_name_are_refused_for_a_module(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"expected {name} null with a network given as a module, got .*; set it in"):
        CrossEntropy(4, network=backbone(), **options)


class TestOtherLabels:
    """A module that is trained again."""

    @staticmethod
    def trained(tmp_path) -> PLC:
        torch.manual_seed(0)
        module = PLC(**SMALL, warmup_epochs=1)
        run = trainer(2)
        run.fit(module, data(seed=3))
        module.corrected.write("labels", torch.arange(5), (module.corrected.labels[:5] + 1) % 4)
        run.save_checkpoint(tmp_path / "plc.ckpt")
        return module

    @pytest.mark.parametrize("loaded", [False, True])
    def test_starts_from_the_new_given_labels(self, tmp_path, loaded):
        module, other = self.trained(tmp_path), data(seed=9)
        if loaded:
            module = PLC.load_from_checkpoint(tmp_path / "plc.ckpt", weights_only=True)
        with pytest.warns(
            UserWarning, match=r"expected the given labels of the earlier training of PLC, got other labels"
        ):
            trainer(2).fit(module, other)
        assert (module.corrected.labels == other.labels).float().mean() > 0.9

    def test_goes_on_with_the_same_labels(self, tmp_path):
        module = self.trained(tmp_path)
        changed = module.corrected.labels.clone()
        source = data(seed=3)
        trainer(2).fit(module, source)
        assert (module.corrected.labels == changed).float().mean() > 0.9
        assert not torch.equal(changed, source.labels)


@pytest.mark.parametrize("options", [{"keep_unmasked": True}, {"regions": "peak_and_trough"}])
def test_guided_mixup_of_two_views_runs_under_sanm(options):
    torch.manual_seed(0)
    sanm = SANM(mu=0.5, seed=0, **options)
    module = MCorrection(**SMALL, bootstrap="soft_to_hard", warmup_epochs=1, guided_epochs=1, sanm=sanm)
    trainer(3).fit(module, data())
    assert module.sanm.last["masked_fraction"].max() > 0


def test_guided_mixup_weights_every_view_by_the_quality_of_its_sample():
    images, targets, quality = torch.rand(6, 3, 4, 4), torch.rand(6, 2), torch.tensor([0.9, 0.1, 0.5])
    mixed = guided_mixup(images, targets, quality, torch.Generator().manual_seed(0))
    for row, partner in enumerate(mixed.partners.tolist()):
        own, other = quality[row % 3], quality[partner % 3]
        expected = (own * images[row] + other * images[partner]) / (own + other)
        torch.testing.assert_close(mixed.images[row], expected)


def test_a_list_of_networks_as_an_argument_is_not_saved():
    class Listed(CrossEntropy):
        def __init__(self, parts: list[nn.Module], width: int = 1, **kwargs):
            super().__init__(4, network=parts[0], **kwargs)

    module = Listed([backbone()], image_size=16, sanm=SANM(mu=0.5))
    assert {"width", "sanm"} <= module.hparams.keys()
    assert "parts" not in module.hparams


def test_a_second_network_keeps_frozen_parameters_and_finite_buffers():
    body = [nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 4))
    network[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="which keeps 0.parametrizations.weight.original"):
        twin = copy_reinitialized(network, "CoTeaching")
    assert torch.equal(twin[1].weight, network[1].weight)
    assert not torch.equal(twin[4].weight, network[4].weight)
    assert all(bool(value.isfinite().all()) for value in twin.state_dict().values())
    assert twin(torch.rand(2, 3, 16, 16)).isfinite().all()


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = create_network("small_cnn", 4, width=4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Positions(L.LightningDataModule):
    """A user's data module with positions and, if known, given labels; its checkpoints do not contain them."""

    def __init__(self, num_samples: int, shift: int | None = None) -> None:
        super().__init__()
        self.num_samples = num_samples
        if shift is not None:
            self.labels = (torch.arange(num_samples) + shift) % 4

    def train_dataloader(self) -> Any:
        index = torch.arange(self.num_samples)
        images = torch.rand(self.num_samples, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, getattr(self, "labels", index % 4), index), 4)


@pytest.mark.parametrize(
    ("before", "after", "got"),
    [((8,), (12,), "12 samples"), ((8,), (4,), "4 samples"), ((8, 0), (8, 1), "other given labels")],
)
def test_a_run_is_not_resumed_with_another_training_set(tmp_path, before, after, got):
    def fit(data: Positions, epochs: int, ckpt: Any = None) -> L.Trainer:
        run = trainer(epochs, callbacks=[SANMCallback(SANM(mu=0.5))])
        run.fit(Small(), data, ckpt_path=ckpt)
        return run

    fit(Positions(*before), 1).save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    fit(Positions(*before), 2, tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=f"with 8 samples, for the per-sample state .*bank' of Small, got {got}; use the same"
    ):
        fit(Positions(*after), 2, tmp_path / "last.ckpt")


class TestASharedSANM:
    @pytest.mark.parametrize("reconstruct", [True, False])
    def test_is_refused_by_a_second_method(self, reconstruct):
        sanm = SANM(mu=0.5, reconstruct=reconstruct)
        CrossEntropy(**SMALL, sanm=sanm)
        with pytest.raises(
            ValueError,
            match="expected a SANM that no other module uses, got one that is built for a network; create a SANM for each",
        ):
            CrossEntropy(**SMALL, sanm=sanm)

    def test_is_refused_for_a_network_of_other_channels(self):
        sanm = SANM(mu=0.5)
        for width in (4, 4):
            sanm.build(create_network("small_cnn", 4, width=width), (16, 16))
        with pytest.raises(
            ValueError, match=r"expected a network with .* channels in its feature map .*; create a SANM for"
        ):
            sanm.build(create_network("small_cnn", 4, width=8), (16, 16))
