"""Cross-entropy, plain and under SANM."""

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import SANM, CrossEntropy, NoisyBatch
from tests.methods.toy import data, method, same, trainer


class Watch:
    """Lay a wire on SANM that notes the views of every step."""

    def __init__(self, module):
        self.views = []
        forward = module.sanm.forward

        def watched(*args):
            self.views.append(forward(*args))
            return self.views[-1]

        module.sanm.forward = watched


class TestPlainCrossEntropy:
    def test_equals_a_loop_without_lightning_bit_for_bit(self):
        module, other = method(), method()
        trainer(2).fit(module, data())
        source = data()
        source.setup("fit")
        optimizer = other.optimizer(other.network.parameters())
        # the same batches: served by the loader and looked up with the stream of its position
        loader = source.train_dataloader()
        for epoch in range(2):
            loader.set_epoch(epoch)
            other.network.train()
            for item in loader:
                batch = source._training_batch(item)
                loss = -(other.one_hot(batch.labels) * other.network(batch.images).log_softmax(1)).sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert same(module.network, other.network)

    def test_holds_no_decoder_and_records_nothing(self):
        module = method()
        trainer(1).fit(module, data())
        assert not list(module.sanm.parameters())
        assert not bool(module.sanm.label_quality.bank.epochs.any()), "nothing was recorded"

    def test_trains_on_any_loader_of_pairs(self):
        images, labels = torch.rand(20, 3, 16, 16), torch.arange(20) % 4
        module = method(SANM(seed=0))
        watch = Watch(module)
        trainer(3).fit(module, DataLoader(TensorDataset(images, labels), 5))
        assert watch.views[-1].box is not None


class TestSANMOverCrossEntropy:
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_with_mu_and_beta_zero_it_is_cross_entropy_bit_for_bit(self, precision):
        plain, idle = method(), method(SANM(mu=0, beta=0))
        trainer(3, precision=precision).fit(plain, data())
        watch = Watch(idle)
        trainer(3, precision=precision).fit(idle, data())
        assert watch.views[-1].ratio is not None, "the pass was never made"
        assert same(plain.network, idle.network)

    def test_masks_after_the_warm_up_and_not_before(self):
        module = method(SANM(seed=0), warmup_epochs=2)
        watch = Watch(module)
        trainer(4).fit(module, data())
        steps = len(watch.views) // 4
        assert [views.box is None for views in watch.views] == [True] * 2 * steps + [False] * 2 * steps
        assert any(bool((views.ratio > 0.01).any()) for views in watch.views[2 * steps :])

    def test_a_warm_up_of_sanm_itself_comes_before_the_methods(self):
        module = method(SANM(seed=0, warmup_epochs=0), warmup_epochs=2)
        watch = Watch(module)
        trainer(1).fit(module, data())
        assert watch.views[0].ratio is not None
        assert bool((watch.views[0].ratio == 0).all()), "nothing is known yet, so every label is trusted"

    def test_quality_in_an_epoch_comes_from_the_losses_of_the_epoch_before(self):
        from sanm_lightning.sanm import clean_probability

        module = method(SANM(seed=0))
        seen: list[tuple[Tensor, Tensor]] = []
        update = module.sanm.label_quality.update

        def watched(logits, targets, index, features=None):
            seen.append((index, -(targets * logits.log_softmax(1)).sum(1)))
            update(logits, targets, index, features)

        module.sanm.label_quality.update = watched
        trainer(2).fit(module, data())
        assert len(seen) == 8, "every batch of both epochs is recorded"
        losses = torch.zeros(64)
        for index, loss in seen[-4:]:
            losses[index] = loss.detach()
        torch.testing.assert_close(module.sanm.label_quality.quality, clean_probability(losses))

    def test_never_reads_true_labels(self):
        class Garbage(type(data())):
            def _labels(self, split, index):
                labels, _ = super()._labels(split, index)
                return labels, torch.full_like(labels, 10**6)

        honest, blind = method(SANM(seed=0)), method(SANM(seed=0))
        trainer(3).fit(honest, data())
        source = data()
        source.__class__ = Garbage
        trainer(3).fit(blind, source)
        assert same(honest.network, blind.network)

    def test_the_oracle_reads_them_and_hides_wrong_labels_only(self):
        module = method(SANM(quality="oracle", seed=0), warmup_epochs=0)
        watch = Watch(module)
        source = data()
        trainer(1).fit(module, source)
        loader = source.train_dataloader()
        loader.set_epoch(0)
        for item, views in zip(loader, watch.views, strict=True):
            wrong = source.labels[item.indices] != source.true_labels[item.indices]
            assert torch.equal(views.ratio > 0, wrong)

    def test_the_oracle_without_true_labels_is_one_clear_sentence(self):
        images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
        module = method(SANM(quality="oracle"), warmup_epochs=0)
        with pytest.raises(ValueError, match="expected batches with true_labels for quality: oracle"):
            trainer(1).fit(module, DataLoader(TensorDataset(images, labels), 4))

    def test_logs_quality_masked_fraction_and_both_losses(self):
        module = method(SANM(seed=0, beta=0.5))
        run = trainer(2)
        run.fit(module, data())
        figures = run.callback_metrics
        for name in ("quality", "masked_fraction"):
            assert 0 <= figures[f"train/{name}"] <= 1
        parts = figures["train/classification_loss"] + 0.5 * figures["train/reconstruction_loss"]
        torch.testing.assert_close(parts, figures["train/loss"])

    def test_learns_a_decoder_that_the_optimizer_knows(self):
        module = method(SANM(seed=0), warmup_epochs=0)
        before = [p.clone() for p in module.sanm.decoder.parameters()]
        trainer(1).fit(module, data())
        after = list(module.sanm.decoder.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_the_network_starts_from_the_weights_it_has_without_sanm(self):
        assert same(method().network, method(SANM()).network)

    @pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}], ids=str)
    def test_honours_the_trainers_settings(self, options):
        usual, changed = method(SANM(seed=0)), method(SANM(seed=0))
        trainer(2).fit(usual, data())
        run = trainer(2, **options)
        run.fit(changed, data())
        assert not same(usual.network, changed.network)
        assert run.global_step == 8 // options.get("accumulate_grad_batches", 1)

    def test_a_training_set_smaller_than_a_batch_still_trains(self):
        module = method(SANM(seed=0))
        trainer(2).fit(module, data(num_samples=9, batch_size=16))
        assert bool((module.sanm.label_quality.bank.epochs == 2).all())


class TestResume:
    def whole_and_resumed(self, tmp_path, stop_at_step, **options):
        whole = method(SANM(seed=0, history="mean"))
        trainer(4, **options).fit(whole, data())

        class Stop(torch.nn.Module):
            pass

        import lightning as L

        class Save(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if trainer.global_step == stop_at_step:
                    trainer.save_checkpoint(tmp_path / "middle.ckpt")
                    trainer.should_stop = True
                    trainer.limit_val_batches = 0

        trainer(4, callbacks=[Save()], **options).fit(method(SANM(seed=0, history="mean")), data())
        resumed = method(SANM(seed=0, history="mean"), seed=99)
        trainer(4, **options).fit(resumed, data(), ckpt_path=tmp_path / "middle.ckpt")
        return whole, resumed

    @pytest.mark.parametrize("step", [2, 6, 7, 8], ids=["warm-up", "mid-epoch", "mid-epoch 2", "last step of an epoch"])
    def test_ends_with_the_weights_of_an_uninterrupted_run(self, tmp_path, step):
        whole, resumed = self.whole_and_resumed(tmp_path, step)
        assert same(whole.network, resumed.network)
        assert same(whole.sanm.decoder, resumed.sanm.decoder)
        assert torch.equal(whole.sanm.label_quality.quality, resumed.sanm.label_quality.quality)
        assert torch.equal(whole.sanm.label_quality.bank.value, resumed.sanm.label_quality.bank.value)

    def test_from_the_end_of_an_epoch(self, tmp_path):
        whole, first, resumed = (method(SANM(seed=0)) for _ in range(3))
        trainer(4).fit(whole, data())
        run = trainer(2)
        run.fit(first, data())
        run.save_checkpoint(tmp_path / "end.ckpt")
        trainer(4).fit(resumed, data(), ckpt_path=tmp_path / "end.ckpt")
        assert same(whole.network, resumed.network)


class TestCheckpoint:
    def saved(self, tmp_path, module):
        run = trainer(2)
        run.fit(module, data())
        run.save_checkpoint(tmp_path / "run.ckpt")
        return tmp_path / "run.ckpt"

    def test_opens_without_executing_anything(self, tmp_path):
        torch.load(self.saved(tmp_path, method(SANM(seed=0))), weights_only=True)

    def test_loads_without_being_told_anything(self, tmp_path):
        module = method(SANM(mu=0.2, seed=0, ratio="random", ratio_range=(0.1, 0.2)))
        path = self.saved(tmp_path, module)
        again = CrossEntropy.load_from_checkpoint(path, weights_only=True)
        assert same(module.network, again.network)
        assert same(module.sanm.decoder, again.sanm.decoder)
        assert again.sanm.options == module.sanm.options
        assert again.hparams["num_classes"] == 4
        assert again.image_size == (16, 16)

    def test_of_the_plain_method_loads_as_the_plain_method(self, tmp_path):
        again = CrossEntropy.load_from_checkpoint(self.saved(tmp_path, method()), weights_only=True)
        assert not again.sanm.enabled


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "expected num_classes >= 2, got 1"),
            ({"num_classes": None}, "expected num_classes >= 2, got None"),
            ({"num_classes": 4, "warmup_epochs": -1}, "expected warmup_epochs >= 0, got -1"),
            ({"num_classes": 4, "network": "resnet_of_my_dreams"}, "expected the name of a timm model"),
            ({"num_classes": 4, "network": "small_cnn", "std": (1.0, 0.0, 1.0)}, "three positive standard deviations"),
            (
                {"num_classes": 4, "network": "resnet18", "image_size": (32, 32), "sanm": SANM()},
                "more than one position, got 1 x 1",
            ),
            (
                {"num_classes": 4, "network": "xcit_nano_12_p16_224", "image_size": (64, 64), "sanm": SANM()},
                "expected logits of Xcit that depend on the feature map",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_is_one_clear_sentence(self, options, message):
        with pytest.raises(ValueError, match=message):
            CrossEntropy(**options)

    def test_a_label_without_a_class_is_found_before_the_first_step(self):
        module = CrossEntropy(3, (16, 16), network="small_cnn")
        with pytest.raises(ValueError, match=r"expected labels in \[0, 3\), got 3"):
            trainer(1).fit(module, data())

    def test_a_nan_image_ends_with_a_sentence_about_losses(self):
        class Broken(type(data())):
            def on_after_batch_transfer(self, *arguments):
                return (
                    super()
                    .on_after_batch_transfer(*arguments)
                    ._replace(images=torch.full((16, 3, 16, 16), float("nan")))
                )

        source = data(track_test=False)
        source.__class__ = Broken
        with pytest.raises(ValueError, match="NaN"):
            trainer(3, limit_val_batches=0).fit(method(SANM(seed=0)), source)


def test_a_noisy_batch_is_a_tuple_of_images_and_labels():
    images, labels, *_ = NoisyBatch(torch.zeros(1), torch.ones(1))
    assert (float(images), float(labels)) == (0.0, 1.0)


def test_a_resumed_run_draws_as_the_first_whatever_the_process_was_seeded_with(tmp_path):
    first = method(SANM())
    run = trainer(2)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = CrossEntropy.load_from_checkpoint(tmp_path / "run.ckpt")
    assert again.sanm.seed == first.sanm.seed


def test_a_frozen_network_comes_back_from_a_checkpoint(tmp_path):
    from sanm_lightning.sanm import FrozenNetwork

    module = method(SANM(place=FrozenNetwork("test_resnet", pretrained=False)))
    run = trainer(2)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = CrossEntropy.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert again.sanm.options == module.sanm.options
    assert isinstance(again.sanm.place, FrozenNetwork)


def test_several_evaluation_sets_of_a_user_each_have_their_accuracy():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    loader = DataLoader(TensorDataset(images, labels), 4)
    run = trainer(1)
    run.fit(method(), loader, [loader, loader])
    assert {"val/acc", "val1/acc"} <= set(run.callback_metrics)
