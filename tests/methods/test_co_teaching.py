"""Co-teaching: its schedule, its choice and its loss against slow loops."""

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM, NoisyBatch
from sanm_lightning.functional import forget_rate, small_loss, soft_cross_entropy
from sanm_lightning.methods import CoTeaching
from tests.methods.toy import data, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


def method(**options) -> CoTeaching:
    torch.manual_seed(0)
    return CoTeaching(**{**SMALL, "warmup_epochs": 1, "num_gradual": 0, "noise_rate": 0.2, **options})


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_schedule_is_a_line_to_the_power_and_then_the_rate(exponent):
    entries = [0.5**exponent * step / 9 for step in range(10)] + [0.5] * 5
    assert [forget_rate(epoch, 0.5, 10, exponent) for epoch in range(15)] == pytest.approx(entries)


def test_the_second_epoch_of_the_published_setting_keeps_120_of_128():
    assert int(small_loss(torch.rand(128), 1 - forget_rate(1, 0.5, 10)).sum()) == 120


def test_the_smallest_losses_are_kept_and_never_none():
    losses = torch.tensor([3.0, 1.0, 2.0, 0.5])
    assert small_loss(losses, 0.5).tolist() == [False, True, False, True]
    assert small_loss(losses, 0.0).tolist() == [False, False, False, True]
    assert bool(small_loss(losses, 1.0).all())


def test_a_product_that_falls_short_by_rounding_keeps_its_sample():
    assert int(small_loss(torch.rand(10), 1 - 0.7).sum()) == 3


def batch() -> NoisyBatch:
    torch.manual_seed(4)
    return NoisyBatch(torch.rand(10, 3, 16, 16), torch.arange(10) % 4, torch.arange(10))


@pytest.mark.parametrize("released", [False, True])
def test_each_network_learns_what_the_other_chose(released):
    module = method(noise_rate=0.7, released_scale=released)
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
    module = method(noise_rate=0.0)
    module.trainer = trainer(1)
    given = batch()
    module.eval()
    both = [F.cross_entropy(network(given.images), given.labels) for network in (module.network, module.network2)]
    torch.testing.assert_close(module.training_step(given, 0), both[0] + both[1])


def test_the_choice_is_made_on_unmasked_images():
    module = method(sanm=SANM(mu=0.6, quality="oracle", seed=0), noise_rate=0.5, warmup_epochs=0)
    seen, chosen = [], []
    learn = module.learn

    def watched(batch, targets, network=0, **options):
        out = learn(batch, targets, network, **options)
        with torch.no_grad():
            kept = small_loss(soft_cross_entropy(out.clean_logits, targets), 0.5)
            masked = small_loss(soft_cross_entropy(out.logits.detach(), targets), 0.5)
        seen.append((kept, masked))
        out_type = type(out)

        class Watched(out_type):
            def classification(self, weight=None):
                chosen.append(weight)
                return super().classification(weight)

        return Watched(*out)

    module.learn = watched
    trainer(1).fit(module, data())
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    for (one, other), weights in zip(pairs, zip(chosen[::2], chosen[1::2], strict=True), strict=True):
        assert torch.equal(weights[0], other[0])
        assert torch.equal(weights[1], one[0])
    assert any(not torch.equal(kept, masked) for kept, masked in seen), "the masks never mattered"


def test_both_networks_are_evaluated_alone():
    module = method()
    run = trainer(1)
    source = data()
    run.fit(module, source)
    module.eval()
    test = source.batch("test", torch.arange(32))
    with torch.no_grad():
        for network, name in ((module.network, "test/acc"), (module.network2, "test/acc_network2")):
            accuracy = (network(test.images).argmax(1) == test.labels).float().mean()
            torch.testing.assert_close(run.callback_metrics[name], accuracy)
        assert torch.equal(module(test.images), module.network(test.images))


def test_it_runs_on_plain_pairs():
    pairs = torch.utils.data.TensorDataset(torch.rand(16, 3, 16, 16), torch.arange(16) % 4)
    trainer(2).fit(method(sanm=SANM(seed=0)), torch.utils.data.DataLoader(pairs, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_rate": 1.0}, r"noise_rate in \[0, 1\), got 1.0"),
        ({"noise_rate": None}, r"noise_rate in \[0, 1\), got None; set noise_rate"),
        ({"num_gradual": -1}, "num_gradual >= 0"),
        ({"exponent": 0.0}, "exponent > 0"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_the_earlier_name_of_the_noise_rate_is_accepted():
    assert method(noise_rate=None, forget_rate=0.3).noise_rate == 0.3
