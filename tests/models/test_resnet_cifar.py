"""ResNets for small images: timm's, with the stem of the released codes."""

import pytest
import timm
import torch
from torch import nn

import sanm_lightning  # noqa: F401  # registers the networks

PUBLISHED = {"resnet18_cifar": 11_173_962, "resnet34_cifar": 21_282_122, "resnet50_cifar": 23_520_842}
"""Parameters with ten classes, as counted in the widely used CIFAR versions of these networks."""


@pytest.mark.parametrize("name", PUBLISHED)
class TestEach:
    def test_has_the_parameters_of_the_published_network(self, name: str) -> None:
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=10)
        assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]

    def test_has_a_map_of_4_by_4_on_images_of_32_pixels(self, name: str) -> None:
        with torch.device("meta"):
            for options in ({}, {"stem_padding": 0}):  # 32 or 30 pixels after the stem
                features = timm.create_model(name, **options).forward_features(torch.ones(2, 3, 32, 32))
                assert features.shape == (2, 2048 if name == "resnet50_cifar" else 512, 4, 4)

    def test_states_the_reduction_of_each_of_its_maps(self, name: str) -> None:
        network = timm.create_model(name, channels=(4, 4, 8, 8)).eval()
        maps = network.forward_intermediates(torch.rand(1, 3, 32, 32), intermediates_only=True)
        for info, features in zip(network.feature_info, maps, strict=True):
            assert features.shape[1:] == (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])

    def test_takes_options_of_timm_and_refuses_others(self, name: str) -> None:
        network = timm.create_model(name, num_classes=3, in_chans=1, channels=(4, 4, 8, 8)).eval()
        assert network(torch.rand(2, 1, 32, 32)).shape == (2, 3)
        with pytest.raises(TypeError, match="depth"):
            timm.create_model(name, depth=3)
        with pytest.raises(ValueError, match=f"{name}, which has no pre-trained weights"):
            timm.create_model(name, pretrained=True)


def test_is_the_network_of_the_released_codes() -> None:
    """A ResNet-18 written out: convolution, norm, ReLU twice per block, projections where the size changes."""
    network = timm.create_model("resnet18_cifar", num_classes=5, channels=(64, 16, 16, 24)).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # statistics that differ from the initial ones
            layer.running_mean.uniform_(-0.5, 0.5), layer.running_var.uniform_(0.5, 2)
    x = images = torch.rand(3, 3, 16, 16)
    weights = network.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = (weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, scale, shift = parts
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    x = torch.relu(norm(nn.functional.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inner = nn.functional.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            inner = torch.relu(norm(inner, f"{name}.bn1"))
            inner = norm(nn.functional.conv2d(inner, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in weights:
                x = norm(
                    nn.functional.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride),
                    f"{name}.downsample.1",
                )
            x = torch.relu(inner + x)
    logits = x.mean(dim=(2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]
    torch.testing.assert_close(network(images), logits)


def test_begins_with_the_initialization_of_pytorch() -> None:
    """Uniform weights within 1 / sqrt(inputs of a unit), and norms of scale 1, also the last one of a block."""
    network = timm.create_model("resnet18_cifar")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            bound = 1 / layer.weight[0].numel() ** 0.5
            assert 0.95 < float(layer.weight.detach().abs().max()) / bound < 1 + 1e-6
        elif isinstance(layer, nn.BatchNorm2d):
            assert torch.equal(layer.weight, torch.ones_like(layer.weight))
