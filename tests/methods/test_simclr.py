"""SimCLR: its loss against a slow loop; it trains without a label, and hands its weights on."""

import math

import pytest
import torch

from sanm_lightning import SANM
from sanm_lightning.functional import nt_xent
from sanm_lightning.methods import C2D, SimCLR
from tests.methods.toy import data, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def test_the_loss_against_a_loop():
    torch.manual_seed(0)
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    rows = torch.cat([one, other]).double().tolist()
    total = 0.0
    for i, anchor in enumerate(rows):
        cosine = [
            sum(a * b for a, b in zip(anchor, row, strict=True)) / math.hypot(*anchor) / math.hypot(*row)
            for row in rows
        ]
        rest = sum(math.exp(cosine[j] / 0.5) for j in range(8) if j != i)
        total -= math.log(math.exp(cosine[(i + 4) % 8] / 0.5) / rest)
    assert float(nt_xent(one, other, 0.5)) == pytest.approx(total / 8, rel=1e-5)


def test_equal_views_of_orthogonal_images_are_nearly_free():
    views = torch.eye(5)
    assert float(nt_xent(views, views, 0.05)) < 1e-6


def test_it_reads_no_label():
    modules = []
    for wrong in (False, True):
        torch.manual_seed(0)
        module, source = SimCLR(**SMALL), data(track_test=False)
        if wrong:
            labels = source._labels
            source._labels = lambda *given, labels=labels: (torch.zeros_like(labels(*given)[0]), None)
        trainer(1).fit(module, source)
        modules.append(module)
    for one, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(one, other)


def test_the_released_scale_multiplies_the_loss():
    losses = []
    for scale in (False, True):
        torch.manual_seed(0)
        run = trainer(1, limit_train_batches=1)
        run.fit(SimCLR(**SMALL, released_scale=scale), data(track_test=False))
        losses.append(float(run.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0] * 0.5 / 0.07, rel=1e-5)


def test_its_checkpoint_starts_c2d(tmp_path):
    torch.manual_seed(0)
    encoder = SimCLR(**SMALL)
    run = trainer(1)
    run.fit(encoder, data(track_test=False))
    run.save_checkpoint(tmp_path / "simclr.ckpt")
    module = C2D(**SMALL, pretrained=str(tmp_path / "simclr.ckpt"), warmup_epochs=1)
    weights = []
    module.on_train_start = lambda: weights.append(module.network2.network.layers[0].weight.detach().clone())
    trainer(2, limit_train_batches=1).fit(module, data())
    assert torch.equal(weights[0], encoder.network.network.layers[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"projection": 0}, "projection >= 1"),
        ({"sanm": SANM()}, "expected SimCLR without SANM"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SimCLR(**SMALL, **options)
