"""PreAct ResNet-18 for small images."""

import pytest
import timm
import torch
from torch import nn

from sanm_lightning.models import PreActResNet
from sanm_lightning.models.preact_resnet import PreActBlock


def published_parameters(width: int, classes: int) -> int:
    """Count by hand: the stem with its norm, 4 x 2 blocks of norm, conv, norm, conv (and shortcut), the classifier."""
    total = 3 * width * 9 + 2 * width
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        for _ in range(2):
            total += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
            if inputs != outputs:
                total += inputs * outputs
            inputs = outputs
    return total + inputs * classes + classes


class TestPreActResNet18:
    def test_has_the_parameters_of_the_published_network(self) -> None:
        with torch.device("meta"):
            network = timm.create_model("preact_resnet18", num_classes=10)
        assert sum(p.numel() for p in network.parameters()) == published_parameters(64, 10) == 11_171_274
        assert network.num_features == 512

    @pytest.mark.parametrize("width", [4, 8])
    def test_width_scales_every_stage(self, width: int) -> None:
        network = timm.create_model("preact_resnet18", num_classes=7, width=width)
        assert isinstance(network, PreActResNet)
        assert sum(p.numel() for p in network.parameters()) == published_parameters(width, 7)
        assert network.num_features == 8 * width
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 7)

    def test_has_a_map_of_512_times_4_times_4_on_small_images(self) -> None:
        with torch.device("meta"):
            network, images = timm.create_model("preact_resnet18", num_classes=10), torch.ones(2, 3, 32, 32)
            assert network.forward_features(images).shape == (2, 512, 4, 4)

    def test_a_stride_in_the_stem_halves_the_map(self) -> None:
        network = timm.create_model("preact_resnet18", width=4, stem_stride=2)
        assert network.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 32, 2, 2)

    def test_forward_is_the_head_after_the_features(self) -> None:
        network, images = timm.create_model("preact_resnet18", num_classes=5, width=4).eval(), torch.rand(2, 3, 32, 32)
        features = network.forward_features(images)
        assert torch.equal(network(images), network.forward_head(features))
        pooled = network.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, features.mean(dim=(2, 3)))
        assert torch.equal(network.get_classifier()(pooled), network(images))

    def test_the_map_has_either_sign(self) -> None:
        features = timm.create_model("preact_resnet18", width=4).forward_features(torch.rand(2, 3, 32, 32))
        assert features.min() < 0 < features.max()

    def test_a_block_without_its_convolutions_passes_its_input_on(self) -> None:
        network = timm.create_model("preact_resnet18", width=4)
        block, x = network.stages[0], torch.randn(2, 4, 8, 8)
        nn.init.zeros_(block.conv2.weight)
        assert torch.equal(block(x), x)

    def test_where_the_size_changes_the_shortcut_sees_the_activated_input(self) -> None:
        network = timm.create_model("preact_resnet18", width=4).eval()
        block, x = network.stages[2], torch.randn(2, 4, 8, 8)
        nn.init.zeros_(block.conv2.weight)
        strided = nn.functional.conv2d(torch.relu(block.norm1(x)), block.shortcut.weight, stride=2)
        torch.testing.assert_close(block(x), strided)

    def test_a_block_of_the_released_form_passes_its_activated_input_on(self) -> None:
        network = timm.create_model("preact_resnet18_dividemix", width=4).eval()
        for block in network.stages:
            assert isinstance(block, PreActBlock)
            nn.init.zeros_(block.conv2.weight)
            if block.shortcut is None:
                x = torch.randn(2, block.conv1.in_channels, 8, 8)
                assert torch.equal(block(x), torch.relu(block.norm1(x)))

    def test_both_forms_have_the_same_parameters_and_other_logits(self) -> None:
        torch.manual_seed(4)
        plain, released = (timm.create_model(f"preact_resnet18{form}", width=4).eval() for form in ("", "_dividemix"))
        released.load_state_dict(plain.state_dict())
        images = torch.rand(2, 3, 32, 32)
        assert not torch.allclose(plain(images), released(images), atol=0.01)
        for block in released.stages:
            block.activated_shortcut = False
        assert torch.equal(plain(images), released(images))

    @pytest.mark.parametrize("width", [4, 5, 6, 8])
    def test_a_narrow_network_learns_in_channels_last(self, width: int) -> None:
        torch.manual_seed(0)
        network = timm.create_model("preact_resnet18", width=width)
        images = torch.rand(8, 3, 32, 32)
        gradients = []
        for layout in (torch.contiguous_format, torch.channels_last):
            network.zero_grad()
            network(images.contiguous(memory_format=layout)).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in network.parameters()])
        for plain, other in zip(*gradients, strict=True):  # not nearer: a ReLU at its edge may flip
            assert float((plain - other).norm()) <= 0.1 * float(plain.norm())

    def test_its_classifier_can_be_replaced(self) -> None:
        network = timm.create_model("preact_resnet18", width=4)
        network.reset_classifier(3)
        assert network(torch.rand(1, 3, 32, 32)).shape == (1, network.num_classes) == (1, 3)

    def test_takes_images_of_other_channels(self) -> None:
        assert timm.create_model("preact_resnet18", width=4, in_chans=1)(torch.rand(1, 1, 16, 16)).shape == (1, 10)

    def test_refuses_weights_that_do_not_exist(self) -> None:
        with pytest.raises(ValueError, match="preact_resnet18, which has no pre-trained weights"):
            timm.create_model("preact_resnet18", pretrained=True)

    def test_refuses_an_option_it_does_not_have(self) -> None:
        with pytest.raises(TypeError, match="depth"):
            timm.create_model("preact_resnet18", depth=3)
