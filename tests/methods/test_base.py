"""What the base of the methods promises: it stops at a loss that is not finite, and begins an epoch once."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sanm_lightning import SANM, CrossEntropy
from sanm_lightning.methods import CoTeaching
from sanm_lightning.methods.passes import evaluation_mode
from tests.methods.toy import data, method, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}


class Breaks(CrossEntropy):
    """NaN from the sixth step on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step >= 5 else loss


def breaking() -> Breaks:
    torch.manual_seed(0)
    return Breaks(**SMALL)


@pytest.mark.parametrize(("interval", "seen"), [(1, 6), (2, 6), (3, 7), (50, 8)])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_next_look(interval, seen):
    run = trainer(5, log_every_n_steps=interval)
    with pytest.raises(ValueError, match=r"got NaN or infinity from Breaks, first at step 6 \(epoch 1"):
        run.fit(breaking(), data())
    assert run.global_step == seen


def test_the_last_good_checkpoint_stays_and_no_bad_one_is_written(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ValueError, match="first at step 6"):
        trainer(5, enable_checkpointing=True, callbacks=[keep]).fit(breaking(), data())
    written = sorted(path.name for path in tmp_path.iterdir())
    assert "step=5.ckpt" in written
    good = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in good.values() if isinstance(value, torch.Tensor))
    assert "step=6.ckpt" not in written


def test_an_epoch_begins_once_also_when_it_is_resumed(tmp_path):
    begun = []

    class Counts(CrossEntropy):
        def begin_epoch(self):
            begun.append(self.current_epoch)

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6)
    trainer(2, enable_checkpointing=True, callbacks=[keep]).fit(Counts(**SMALL), data())
    assert begun == [0, 1]
    again = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6)
    run = trainer(3, enable_checkpointing=True, callbacks=[again])
    run.fit(Counts(**SMALL), data(), ckpt_path=tmp_path / "step=6.ckpt")
    assert begun == [0, 1, 2]


def test_evaluating_puts_every_part_back_into_its_own_mode():
    module = method()
    module.network.network.eval()
    modes = {name: part.training for name, part in module.named_modules()}
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert {name: part.training for name, part in module.named_modules()} == modes


class TestTwoNetworks:
    def test_networks_start_from_weights_of_their_own_also_when_one_is_given(self):
        named = CoTeaching(**SMALL, noise_rate=0.2)
        assert not same(named.network, named.network2)
        given = CoTeaching(noise_rate=0.2, **{**SMALL, "network": named.network, "network_args": None})
        assert given.network is named.network
        assert not same(given.network, given.network2)
        shapes = [[p.shape for p in network.parameters()] for network in (given.network, given.network2)]
        assert shapes[0] == shapes[1]

    def test_each_has_a_decoder_and_an_estimate_of_its_own(self):
        module = CoTeaching(**SMALL, noise_rate=0.2, sanm=SANM(seed=0), warmup_epochs=0)
        assert not same(module.sanm.decoder, module.sanm2.decoder)
        trainer(2).fit(module, data())
        assert not torch.equal(module.sanm.label_quality.quality, module.sanm2.label_quality.quality)

    def test_the_sum_under_one_optimizer_takes_the_steps_of_two(self):
        """Network 1 learns the same whatever becomes of network 2, where the methods do not couple them."""
        both = []
        for other in (0.0, 0.5):
            torch.manual_seed(0)
            module = CoTeaching(**SMALL, noise_rate=0.0)
            with torch.no_grad():
                module.network2.network.fc.weight.mul_(1 + other)
            trainer(2, gradient_clip_val=0.5).fit(module, data())
            both.append(module)
        assert same(both[0].network, both[1].network)
        assert not same(both[0].network2, both[1].network2)


def test_one_number_is_the_side_of_a_square_and_other_sizes_are_refused_in_a_sentence():
    module = CrossEntropy(**{**SMALL, "image_size": 16})
    assert module.image_size == (16, 16)
    assert module.hparams["image_size"] == (16, 16)
    for size in (None, (16,), (0, 16), "16"):
        with pytest.raises(ValueError, match=r"^expected image_size \(H, W\) in pixels, got .*; use the image_size of"):
            CrossEntropy(**{**SMALL, "image_size": size})
