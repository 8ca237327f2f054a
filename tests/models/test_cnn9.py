"""The nine-layer network of Co-teaching."""

import pytest
import timm
import torch
from torch import nn

from sanm_lightning.models import CNN9


@pytest.fixture(scope="module")
def network() -> CNN9:
    made = timm.create_model("cnn9", num_classes=5).eval()
    assert isinstance(made, CNN9)
    return made


class TestCNN9:
    def test_has_nine_convolutions_of_the_published_widths(self, network: CNN9) -> None:
        widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert widths == [128, 128, 128, 256, 256, 256, 512, 256, 128]
        assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.01}
        assert [m.p for m in network.modules() if isinstance(m, nn.Dropout2d)] == [0.25, 0.25]

    def test_has_the_parameters_counted_by_hand(self, network: CNN9) -> None:
        total, inputs = 0, 3
        for outputs in (128, 128, 128, 256, 256, 256, 512, 256, 128):
            total += 9 * inputs * outputs + outputs + 2 * outputs  # convolution with bias, norm
            inputs = outputs
        assert sum(p.numel() for p in network.parameters()) == total + 128 * 5 + 5

    @pytest.mark.parametrize(("size", "side"), [(32, 2), (28, 1)])
    def test_has_a_map_of_128_channels(self, size: int, side: int) -> None:
        with torch.device("meta"):
            network = timm.create_model("cnn9").eval()
            assert network.forward_features(torch.ones(1, 3, size, size)).shape == (1, 128, side, side)

    def test_forward_is_the_head_after_the_features(self, network: CNN9) -> None:
        with torch.no_grad():
            images = torch.rand(1, 3, 28, 28)
            features = network.forward_features(images)
            logits = network(images)
            assert logits.shape == (1, 5)
            assert torch.equal(logits, network.forward_head(features))
            pooled = network.forward_head(features, pre_logits=True)
            assert torch.equal(network.get_classifier()(pooled), logits)

    def test_drops_channels_in_training_only(self) -> None:
        with torch.no_grad():
            network, images = timm.create_model("cnn9", drop_rate=0.9), torch.rand(1, 3, 28, 28)
            for module in network.modules():
                module.training = isinstance(module, nn.Dropout2d)
            assert not torch.equal(network(images), network(images))
            network.eval()
            assert torch.equal(network(images), network(images))

    def test_its_classifier_can_be_replaced(self) -> None:
        with torch.device("meta"):
            network = timm.create_model("cnn9").eval()
            network.reset_classifier(3)
            assert network(torch.ones(1, 3, 28, 28)).shape == (1, network.num_classes) == (1, 3)

    def test_refuses_weights_that_do_not_exist(self) -> None:
        with pytest.raises(ValueError, match="cnn9, which has no pre-trained weights"):
            timm.create_model("cnn9", pretrained=True)

    def test_refuses_an_option_it_does_not_have(self) -> None:
        with pytest.raises(TypeError, match="width"):
            timm.create_model("cnn9", width=3)
