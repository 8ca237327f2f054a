"""Two processes of batch b take the steps of one of batch 2 b."""

import pytest
import torch
from torch import nn

from sanm_lightning.methods import SimCLR
from sanm_lightning.models.pooled import PooledClassifier
from tests.methods.toy import data, trainer


class Plain(PooledClassifier):
    """A network without batch statistics, which would be those of half a batch."""

    def __init__(self):
        super().__init__(8, 4)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.reset_classifier(4)

    def forward_features(self, x):
        return torch.tanh(self.conv(x))


class FixedViews(SimCLR):
    """Views that are a function of the image alone: the streams of two processes differ from that of one."""

    def views(self, index, generator, *policies):
        images = self.trainer.datamodule.batch("train", index).images
        return [images, images.flip(-1)]


def learn(batch_size: int, **options) -> tuple[dict, dict]:
    torch.manual_seed(0)
    module = FixedViews(num_classes=4, image_size=(16, 16), network=Plain(), temperature=0.1, optimizer=sgd)
    before = {name: value.clone() for name, value in module.state_dict().items() if torch.is_tensor(value)}
    trainer(1, **options).fit(module, data(track_test=False, batch_size=batch_size))
    return before, module.state_dict()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
def test_every_view_of_simclr_looks_for_its_partner_in_all_processes():
    before, whole = learn(16)
    _, halves = learn(8, accelerator="cpu", devices=2, strategy="ddp_spawn")
    for name in ("network.conv.weight", "projection.0.weight", "projection.2.weight"):
        assert float((whole[name] - before[name]).abs().max()) > 1e-3, "nothing was learned"
        torch.testing.assert_close(halves[name], whole[name], rtol=0, atol=1e-5)
