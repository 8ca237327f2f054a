"""Co-teaching: its schedule, its choice and its loss against slow loops."""

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM, NoisyBatch
from sanm_lightning.methods import CoTeaching
from sanm_lightning.methods.co_teaching import forget_share, small_loss
from tests.methods.toy import data, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(**options) -> CoTeaching:
    torch.manual_seed(0)
    return CoTeaching(**{**SMALL, "warmup_epochs": 1, "num_gradual": 0, **options})


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_schedule_is_a_line_to_the_power_and_then_the_rate(exponent):
    entries = [0.5**exponent * step / 9 for step in range(10)] + [0.5] * 5
    assert [forget_share(epoch, 0.5, 10, exponent) for epoch in range(15)] == pytest.approx(entries)


def test_the_second_epoch_of_the_published_setting_keeps_120_of_128():
    assert len(small_loss(torch.rand(128), 1 - forget_share(1, 0.5, 10))) == 120


def test_the_smallest_losses_are_kept_and_never_none():
    losses = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert sorted(small_loss(losses, 0.5).tolist()) == [1, 3]
    assert small_loss(losses, 0.0).tolist() == [3]
    assert sorted(small_loss(losses, 1.0).tolist()) == [0, 1, 2, 3]


def test_a_product_that_falls_short_by_rounding_keeps_its_sample():
    assert len(small_loss(torch.rand(10), 1 - 0.7)) == 3


def batch() -> NoisyBatch:
    torch.manual_seed(4)
    return NoisyBatch(torch.rand(10, 3, 16, 16), torch.arange(10) % 4, torch.arange(10))


@pytest.mark.parametrize("released", [False, True])
def test_each_network_learns_what_the_other_chose(released):
    module = method(forget_rate=0.7, released_scale=released)
    run = trainer(1)
    run.fit_loop.epoch_progress.current.completed = 0
    module.trainer = run
    given = batch()
    module.eval()
    loss = module.training_step(given, 0)
    each = []
    for network in (module.network, module.network2):
        logits = network(given.images).detach()
        each.append([float(F.cross_entropy(logits[i : i + 1], given.labels[i : i + 1])) for i in range(10)])
    chosen = [sorted(range(10), key=lambda i, k=k: each[k][i])[:3] for k in (0, 1)]
    expected = sum(each[0][i] for i in chosen[1]) / 3 + sum(each[1][i] for i in chosen[0]) / 3
    assert float(loss.detach()) == pytest.approx(expected / (3 if released else 1), rel=1e-4)


def test_with_nothing_left_out_it_is_cross_entropy_of_both():
    module = method(forget_rate=0.0)
    module.trainer = trainer(1)
    given = batch()
    module.eval()
    both = [F.cross_entropy(network(given.images), given.labels) for network in (module.network, module.network2)]
    torch.testing.assert_close(module.training_step(given, 0), both[0] + both[1])


def test_the_choice_is_made_on_unmasked_images():
    module = method(sanm=SANM(mu=0.6, seed=0), forget_rate=0.5)
    seen = []
    forward = module.sanm.forward
    module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
    trainer(3).fit(module, data())
    assert seen[-1].logits is not None
    assert seen[-1].rows(torch.tensor([2]), 16).tolist() == [2]


def test_both_networks_are_evaluated_alone():
    module = method()
    run = trainer(1)
    source = data()
    run.fit(module, source)
    module.eval()
    test = source.batch("test", torch.arange(32))
    with torch.no_grad():
        for network, name in ((module.network, "test/acc"), (module.network2, "test/acc_network2")):
            share = (network(test.images).argmax(1) == test.labels).float().mean()
            torch.testing.assert_close(run.callback_metrics[name], share)
        assert torch.equal(module(test.images), module.network(test.images))


def test_it_runs_on_plain_pairs():
    pairs = torch.utils.data.TensorDataset(torch.rand(16, 3, 16, 16), torch.arange(16) % 4)
    trainer(2).fit(method(sanm=SANM(seed=0)), torch.utils.data.DataLoader(pairs, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget_rate": 1.0}, r"forget_rate in \[0, 1\), got 1.0"),
        ({"num_gradual": -1}, "num_gradual >= 0"),
        ({"exponent": 0.0}, "exponent > 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)
