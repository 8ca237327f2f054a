"""What the seam leaves room for, and what it refuses because the map would not be the paper's."""

import pytest
import timm
import torch
from torch import nn

from sanm_lightning.models import create_network
from sanm_lightning.sanm import SANM, reconstruction_loss
from sanm_lightning.sanm.activation import upsample
from sanm_lightning.sanm.saliency import cam


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_network("small_cnn", 4, width=4)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 16, 16, generator=generator), torch.eye(4)[torch.arange(6) % 4], torch.zeros(6)


class Normed(nn.Module):
    """A norm between pooling and classifier, as ConvNeXt has it."""

    num_features = 5

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 5, 3), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, x):
        return self.fc(self.norm(x.mean((2, 3))))

    def get_classifier(self):
        return self.fc


class TestExactness:
    def test_a_head_that_is_more_than_one_linear_map_is_served_by_its_gradient(self, batch):
        sanm, network = SANM(seed=0), Normed()
        sanm.build(network, (16, 16))
        images = batch[0]
        features = network.forward_features(images).detach().requires_grad_()
        network.forward_head(features).max(1).values.sum().backward()
        expected = torch.einsum("bdij,bd->bij", features.detach(), features.grad.sum((2, 3)))
        torch.testing.assert_close(sanm(network, *batch).activation, upsample(expected, (16, 16)))

    def test_and_is_served_by_the_energy_map(self, batch):
        sanm, network = SANM(place="energy"), Normed()
        sanm.build(network, (16, 16))
        assert sanm(network, *batch).box is not None

    @pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "cnn9", "preact_resnet18"])
    def test_a_linear_classifier_on_the_average_is_served_by_eq_1(self, name):
        options = {"width": 4} if name == "preact_resnet18" else {}
        sanm = SANM()
        sanm.build(timm.create_model(name, num_classes=4, **options), (64, 64))
        assert sanm.maps.chosen is cam


class TestFeaturesFromTheMethod:
    def test_give_the_views_of_the_pass_without_the_pass(self, network, batch):
        images, targets, quality = batch
        one, other = SANM(seed=0, batch_statistics=False), SANM(seed=0, batch_statistics=False)
        network.eval()
        expected = one(network, images, targets, quality)
        features = network.forward_features(images)
        network.forward_features = None  # whoever calls it now fails
        given = other(network, images, targets, quality, features=features)
        assert torch.equal(given.images, expected.images)
        assert torch.equal(given.logits, expected.logits)
        assert not given.activation.requires_grad


class TestSeveralMaskedCopies:
    def test_are_each_painted_towards_the_image(self, network, batch):
        images, targets, quality = batch
        sanm = SANM(seed=0, beta=1.0)
        sanm.build(network, (16, 16))
        views = sanm(network, images, targets, quality)
        features = network.forward_features(torch.cat([views.images, views.images.flip(3)]))
        one, two = (reconstruction_loss(sanm.decoder(half), images) for half in features.chunk(2))
        torch.testing.assert_close(sanm.reconstruction(features, images), (one + two) / 2)

    def test_a_broken_copy_is_refused(self, network, batch):
        sanm = SANM(seed=0)
        sanm.build(network, (16, 16))
        sanm(network, *batch)
        with pytest.raises(ValueError, match="expected features of the views of 6 images, got 9 feature maps"):
            sanm.reconstruction(torch.rand(9, 16, 4, 4), batch[0])


def test_a_table_made_after_the_move_lies_where_the_table_was():
    quality = SANM().label_quality.to("meta")
    quality.reset(5)
    assert quality.bank.value.device.type == quality.quality.device.type == "meta"
