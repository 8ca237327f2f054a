"""Normalisation as the first layer of a network."""

import io

import pytest
import timm
import torch
from torch import Tensor

from sanm_lightning.models import CNN9, Normalized, PreActResNet, create_network

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def small(seed: int = 0) -> PreActResNet:
    torch.manual_seed(seed)
    return PreActResNet(num_classes=4, width=4).eval()


class TestNormalized:
    def test_shows_the_network_normalised_images(self) -> None:
        seen: list[Tensor] = []
        network, images = small(), torch.rand(2, 3, 16, 16)
        network.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        Normalized(network, MEAN, STD)(images)
        for channel in range(3):
            expected = (images[:, channel] - MEAN[channel]) / STD[channel]
            torch.testing.assert_close(seen[0][:, channel], expected)

    def test_with_mean_zero_and_deviation_one_is_the_network(self) -> None:
        network, images = small(), torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(Normalized(network, (0.0, 0, 0), (1.0, 1, 1))(images), network(images))

    def test_forward_is_the_head_after_the_features(self) -> None:
        network, images = Normalized(small(), MEAN, STD), torch.rand(2, 3, 16, 16)
        features = network.forward_features(images)
        assert features.shape[1] == network.num_features
        assert torch.equal(network(images), network.forward_head(features))
        assert torch.equal(network.get_classifier()(network.forward_head(features, pre_logits=True)), network(images))

    def test_keeps_the_statistics_in_its_state(self) -> None:
        file, images = io.BytesIO(), torch.rand(2, 3, 16, 16)
        saved, loaded = Normalized(small(0), MEAN, STD), Normalized(small(1), (0.5,) * 3, (0.5,) * 3)
        torch.save(saved.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(saved.eval()(images), loaded.eval()(images))

    def test_leaves_the_images_alone(self) -> None:
        images = torch.rand(2, 3, 16, 16)
        before = images.clone()
        Normalized(small(), MEAN, STD)(images)
        assert torch.equal(images, before)

    @pytest.mark.parametrize(
        ("mean", "std"), [((), ()), (MEAN, (0.5, 0.5)), (MEAN, (0.5, 0.0, 0.5)), (MEAN, (0.5, -1.0, 0.5))]
    )
    def test_refuses_statistics_that_do_not_normalise(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        with pytest.raises(
            ValueError,
            match=r"expected (one|three) means and (one|three) positive standard deviations, got .*; use those of",
        ):
            Normalized(small(), mean, std)

    def test_refuses_images_of_another_number_of_channels(self) -> None:
        with pytest.raises(ValueError, match=r"expected images of 3 channels, the in_chans of the network, got 1; set"):
            Normalized(small(), MEAN, STD)(torch.rand(2, 1, 16, 16))


class TestCreateNetwork:
    @pytest.mark.parametrize(
        ("name", "options", "kind"), [("preact_resnet18", {"width": 4}, PreActResNet), ("cnn9", {}, CNN9)]
    )
    def test_builds_our_own_networks_by_name(self, name: str, options: dict[str, int], kind: type) -> None:
        with torch.device("meta"):
            network = create_network(name, 6, MEAN, STD, **options)
            assert isinstance(network.network, kind)
            assert network.eval()(torch.ones(1, 3, 32, 32)).shape == (1, 6)

    def test_builds_any_timm_model(self) -> None:
        network = create_network("test_resnet", 6)
        assert type(network.network) is type(timm.create_model("test_resnet"))
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 6)

    def test_of_unknown_images_takes_neutral_statistics(self) -> None:
        network = create_network("preact_resnet18", 4, width=4)
        assert network.mean.flatten().tolist() == [0.5] * 3
        assert network.std.flatten().tolist() == [0.25] * 3

    def test_takes_the_statistics_that_are_given(self) -> None:
        network = create_network("preact_resnet18", 4, MEAN, STD, width=4)
        assert torch.equal(network.mean.flatten(), torch.tensor(MEAN))
        assert torch.equal(network.std.flatten(), torch.tensor(STD))

    def test_of_a_pre_trained_network_takes_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def downloaded(name: str, num_classes: int, pretrained: bool) -> PreActResNet:
            network = small()
            network.pretrained_cfg = {"mean": MEAN, "std": STD}  # type: ignore[assignment]
            return network

        monkeypatch.setattr(timm, "create_model", downloaded)
        assert torch.equal(create_network("resnet18", 4, pretrained=True).mean.flatten(), torch.tensor(MEAN))
        own = create_network("resnet18", 4, (0.5,) * 3, pretrained=True)
        assert own.mean.flatten().tolist() == [0.5] * 3
        assert torch.equal(own.std.flatten(), torch.tensor(STD))

    @pytest.mark.parametrize(
        "name", ["preact_resnet18", "cnn9", "small_cnn", "resnet18_cifar", "test_resnet", "test_vit"]
    )
    @pytest.mark.parametrize("channels", [1, 4])
    def test_images_of_one_to_four_channels(self, name: str, channels: int) -> None:
        options = {"img_size": 32} if name == "test_vit" else {}
        network = create_network(name, 3, in_chans=channels, **options).eval()
        assert network.mean.shape == network.std.shape == (channels, 1, 1)
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 3)

    def test_of_a_pre_trained_network_in_gray_takes_the_average_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def downloaded(name: str, num_classes: int, pretrained: bool, in_chans: int) -> PreActResNet:
            network = small()
            network.pretrained_cfg = {"mean": (0.1, 0.2, 0.6), "std": STD}  # type: ignore[assignment]
            return network

        monkeypatch.setattr(timm, "create_model", downloaded)
        network = create_network("resnet18", 4, std=(0.7,), pretrained=True, in_chans=1)
        assert network.mean.flatten().tolist() == pytest.approx([0.3])
        assert network.std.flatten().tolist() == pytest.approx([0.7])

    @pytest.mark.parametrize(("mean", "channels"), [(MEAN, 1), ((0.5,), 3)])
    def test_statistics_of_another_number_of_channels_are_refused(self, mean: tuple[float, ...], channels: int) -> None:
        with pytest.raises(
            ValueError, match=rf"expected {channels} means and {channels} standard deviations, .*; set in_chans in"
        ):
            create_network("preact_resnet18", 4, mean, width=4, in_chans=channels)

    def test_without_global_pooling_is_refused(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"expected network_args with a global pooling of timm, which returns logits \(B, C\), got global_pool ''; "
            "omit global_pool, or use avg or another pooling of 'test_resnet'",
        ):
            create_network("test_resnet", 6, global_pool="")
        assert create_network("test_resnet", 6, global_pool="max").eval()(torch.rand(1, 3, 32, 32)).shape == (1, 6)

    def test_of_a_name_with_a_typing_error_shows_the_nearest(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"expected the name of a timm model, got 'preact_resnet_18'; choose one of .*preact_resnet18",
        ):
            create_network("preact_resnet_18", 4)

    @pytest.mark.parametrize("name", ["preact_resnet18", "cnn9"])
    def test_refuses_weights_that_do_not_exist(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}, which has no pre-trained weights"):
            create_network(name, 4, pretrained=True)
