"""Images of third-party modules: any normalization, one to four channels, and what is refused before the first update."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.pictures.look import Look
from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.masking import apply_mask
from sanm_lightning.sanm.module import FrozenNetwork
from sanm_lightning.sanm.normalization import Normalization
from tests.sanm.test_callback import SIZE, Mixed, Small, Stranger, assert_same, fit, pairs, served, weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = Normalization(MEAN, STD)


def batches(change: Any = lambda x: x) -> Any:
    return served([[change(x), y] for x, y in pairs()])


class Recording(FrozenNetwork):
    """A frozen network that notes its images."""

    def __init__(self) -> None:
        super().__init__("test_resnet", pretrained=False)
        self.seen: list[Tensor] = []

    def maps(self, images: Tensor) -> Tensor:
        self.__dict__.setdefault("seen", []).append(images)
        return torch.rand(len(images), 4, 4)


class NormalizingSmall(Small):
    """The same network, for images in [0, 1]."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(STATISTICS.normalize(x))


def run(kind: str, data: Any, network: Any = Small, sanm: dict[str, Any] | None = None, **options: Any) -> Any:
    """Fit a module with SANM, and return the module and SANM."""
    torch.manual_seed(3)
    part = SANM(mu=0.4, beta=1.0, seed=0, ratio="fixed", **(sanm or {}))
    if kind == "callback":
        module: Any = Stranger(0.0)
        callbacks = [SANMCallback(part, **options)]
    else:
        module = Mixed(dropout=0.0, sanm=part, **{f"sanm_{name}": value for name, value in options.items()})
        callbacks = []
    torch.manual_seed(3)
    module.net = network(0.0)
    return module, part, fit(module, *callbacks, data=data).callback_metrics


class TestNormalized:
    @pytest.mark.parametrize("fill", ["pixel", "channel"])
    def test_the_fill_is_that_of_images_in_0_1_normalized(self, fill: str) -> None:
        images, box = torch.rand(4, 3, 8, 8), torch.tensor([[0.0, 8.0, 0.0, 8.0]] * 4)
        plain, normalized = (
            apply_mask(x, box, fill=fill, generator=torch.Generator().manual_seed(0), normalize=normalize)
            for x, normalize in ((images, None), (STATISTICS.normalize(images), STATISTICS.normalize))
        )
        assert torch.equal(normalized, STATISTICS.normalize(plain))
        assert normalized.min() < -1.5

    def test_the_reconstruction_loss_is_that_of_images_in_0_1(self) -> None:
        images, targets = torch.rand(4, 3, SIZE, SIZE), torch.eye(3)[torch.tensor([0, 1, 2, 0])]
        losses = []
        for x, normalization in ((images, None), (STATISTICS.normalize(images), STATISTICS)):
            sanm, network = SANM(seed=0, beta=1.0), Small()
            sanm.normalization = normalization
            sanm.build(network, (SIZE, SIZE))
            sanm(network, x, targets, torch.zeros(4))
            losses.append(sanm.reconstruction(torch.ones(4, 8, 4, 4), x))
        torch.testing.assert_close(losses[0], losses[1])

    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_with_mean_and_std_training_is_that_on_images_in_0_1_with_the_normalization_in_the_network(
        self, kind: str
    ) -> None:
        inside = run(kind, batches(), NormalizingSmall)
        outside = run(kind, batches(STATISTICS.normalize), mean=MEAN, std=STD)
        assert inside[2]["train/masked_fraction"] > 0.2
        for name in ("train/masked_fraction", "train/reconstruction_loss", "train/classification_loss"):
            torch.testing.assert_close(inside[2][name], outside[2][name], rtol=1e-4, atol=1e-5)
        one, other = weights(inside[0], inside[1].decoder), weights(outside[0], outside[1].decoder)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)

    def test_a_frozen_network_receives_images_in_0_1(self) -> None:
        place = Recording()
        run("callback", batches(STATISTICS.normalize), sanm={"place": place}, mean=MEAN, std=STD)
        torch.testing.assert_close(place.seen[-1], list(pairs())[-1][0])

    def test_pictures_show_images_in_0_1(self) -> None:
        images, labels = next(iter(pairs()))
        sanm, network = SANM(seed=0), Small()
        sanm.build(network, (SIZE, SIZE))
        sanm.normalization = STATISTICS
        look = Look(network, sanm, 3, ["a", "b", "c"])
        block = look.block("", NoisyBatch(STATISTICS.normalize(images), labels), torch.zeros(6))
        torch.testing.assert_close(block.images, images)
        assert -1e-5 <= block.views.images.min() <= block.views.images.max() <= 1 + 1e-5

    def test_one_value_for_all_channels_is_enough(self) -> None:
        every = run("callback", batches(lambda x: 2 * x - 1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        one = run("callback", batches(lambda x: 2 * x - 1), mean=0.5, std=[0.5])
        assert_same(weights(every[0], every[1].decoder), weights(one[0], one[1].decoder))

    def test_statistics_are_not_in_the_state_dict(self) -> None:
        sanm = SANM()
        sanm.normalization = STATISTICS
        assert not [name for name in sanm.state_dict() if "mean" in name or "std" in name]

    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_without_mean_and_std_they_are_refused_before_the_first_update(self, kind: str) -> None:
        with pytest.raises(
            MisconfigurationException,
            match=r"expected images in \[0, 1\] in the batches, got -\d.* to \d.*; pass the mean= and std= .*sanm_mean=",
        ):
            run(kind, batches(STATISTICS.normalize))

    def test_and_accepted_if_declared_as_they_are_or_if_only_labels_are_changed(self) -> None:
        data = batches(STATISTICS.normalize)
        run("callback", data, mean=0, std=1)
        run("callback", data, sanm={"mask": False, "reconstruct": False})

    def test_statistics_of_another_range_cause_a_warning(self) -> None:
        with pytest.warns(UserWarning, match=r"expected images \(x - mean\) / std of x in \[0, 1\], got x from 0.5"):
            run("callback", batches(), mean=0.5, std=2.0)

    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_statistics_of_images_up_to_255_are_refused_before_the_first_update(self, kind: str) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"x in \[0, 1\], got x from 1\d\d to 1\d\d; .* divided by 255"
        ):
            run(kind, batches(), mean=(127.0, 127.0, 127.0), std=(60.0, 60.0, 60.0))

    @pytest.mark.parametrize(
        ("mean", "std"), [(MEAN, None), (None, STD), (MEAN, (0.2, 0.2)), (0.5, 0.0), (float("nan"), 1.0), ((), ())]
    )
    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_invalid_statistics_are_refused_in_the_constructor(self, kind: str, mean: Any, std: Any) -> None:
        with pytest.raises(ValueError, match=r"expected .*mean and .*std.*, got mean"):
            SANMCallback(mean=mean, std=std) if kind == "callback" else Mixed(sanm_mean=mean, sanm_std=std)

    def test_statistics_of_another_number_of_channels_are_refused(self) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"expected mean and std for the 3 channels .*, got 2 values"
        ):
            run("callback", batches(), mean=(0.5, 0.5), std=(0.5, 0.5))


def small_of(channels: int) -> Any:
    def make(dropout: float) -> Small:
        network = Small(dropout)
        network.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        return network

    return make


class TestChannels:
    @pytest.mark.parametrize("channels", [1, 2, 4])
    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_one_to_four_are_masked_and_reconstructed(self, kind: str, channels: int) -> None:
        data = batches(lambda x: x[:, [0] * channels])
        _, sanm, metrics = run(kind, data, small_of(channels), image_size=(SIZE, SIZE))
        assert sanm.decoder(torch.ones(2, 8, 4, 4)).shape == (2, channels, SIZE, SIZE)
        assert metrics["train/masked_fraction"] > 0.1
        assert metrics["train/reconstruction_loss"] > 0

    def test_are_restored_from_a_state_dict(self) -> None:
        sanm, loaded = SANM(seed=0), SANM(seed=1)
        sanm.build(small_of(1)(0.0), (SIZE, SIZE))
        loaded.load_state_dict(sanm.state_dict())
        assert loaded.decoder is not None
        assert loaded.decoder.image_channels == 1

    def test_are_three_in_the_state_of_an_earlier_version(self) -> None:
        sanm, loaded = SANM(seed=0), SANM(seed=1)
        sanm.build(Small(), (SIZE, SIZE))
        state = sanm.state_dict()
        state["_extra_state"] = {**state["_extra_state"], "decoder": state["_extra_state"]["decoder"][:2]}
        loaded.load_state_dict(state)
        assert loaded.decoder is not None
        assert loaded.decoder.image_channels == 3


class TestRefusedBeforeTheFirstUpdate:
    @pytest.mark.parametrize(
        ("change", "options", "match"),
        [
            (lambda x: (x * 255).byte(), {}, r"expected floating images .*, got torch.uint8; convert them .*/ 255"),
            (
                lambda x: x.repeat(1, 1, 2, 2),
                {"image_size": (SIZE, SIZE)},
                r"expected images \(C, H, W\) = \(3, 8, 8\), .* got \(3, 16, 16\); set image_size",
            ),
            (
                lambda x: x[:, 0],
                {"image_size": (SIZE, SIZE)},
                r"with images \(B, C, H, W\) first .* got elements \(6, 8, 8\)",
            ),
        ],
        ids=["uint8", "another size", "without channels"],
    )
    def test_dtype_and_shape(self, change: Any, options: dict[str, Any], match: str) -> None:
        module = Stranger()
        before = weights(module)
        with pytest.raises(MisconfigurationException, match=match):
            fit(module, SANMCallback(SANM(warmup_epochs=2), **options), data=batches(change))
        after = weights(module)
        assert_same({"w": before["net.conv.weight"]}, {"w": after["net.conv.weight"]})

    def test_the_index_first(self) -> None:
        data = served([[torch.arange(6), x, y] for x, y in pairs()])
        with pytest.raises(MisconfigurationException, match=r"got elements \(6,\), .*; return \(image, label, index\)"):
            fit(Stranger(), SANMCallback(), data=data)

    def test_a_number_is_a_square_image_size(self) -> None:
        module, callback = Stranger(), SANMCallback(image_size=SIZE)
        fit(module, callback, epochs=1)
        assert callback.sanm.decoder is not None
        assert callback.sanm.decoder.image_size == (SIZE, SIZE)
