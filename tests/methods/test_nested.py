"""Nested, alone and with Co-teaching, against loops and in its limits."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sanm_lightning import SANM
from sanm_lightning.functional import nested_probabilities, truncated_accuracy
from sanm_lightning.methods import CrossEntropy, Nested, NestedCoTeaching
from sanm_lightning.sanm.saliency import cam, grad_cam
from tests.methods.reference import SMALL, C, batch, predictions, ready
from tests.methods.test_every_method import AtStep
from tests.methods.test_stages import Endless
from tests.methods.toy import data, same, trainer

WIDTH = 16  # features of the small network


def module(kind=Nested, **options):
    torch.manual_seed(0)
    return kind(**{**SMALL, "warmup_epochs": 1, **options})


def test_probabilities_decrease_as_a_gaussian_and_are_uniform_in_the_limit():
    weights = [math.exp(-((k / 3) ** 2)) for k in range(1, 9)]
    assert nested_probabilities(8, 3.0).tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert nested_probabilities(8, math.inf).tolist() == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize("elements", [1, 2**24])
def test_the_accuracy_of_each_number_of_features_is_that_of_the_truncated_networks(elements):
    torch.manual_seed(0)
    features, weight, bias, labels = torch.randn(2, 9, 5), torch.randn(2, C, 5), torch.randn(C), torch.arange(9) % C
    for k, found in enumerate(truncated_accuracy(features, weight, bias, labels, elements).tolist(), 1):
        logits = sum(features[n, :, :k] @ weight[n, :, :k].T for n in range(2)) + bias
        assert found == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def truncated(network, images, k):
    """Logits of a copy whose classifier has weights 0 beyond the first k features."""
    twin = copy.deepcopy(network)
    twin.get_classifier()._forward_pre_hooks.clear()
    with torch.no_grad():
        twin.get_classifier().weight[:, k:] = 0
        return twin(images)


class TestNested:
    def test_with_all_features_it_is_the_plain_network(self):
        plain, kept = module(CrossEntropy), module(sigma=None)
        for made in (plain, kept):
            trainer(2).fit(made, data())
        assert same(plain.network, kept.network)

    def test_predictions_use_the_first_features_and_steps_a_random_number(self):
        made, given = module(num_features=5, sigma=2.0), batch()
        made.eval()
        torch.testing.assert_close(made(given.images), truncated(made.network, given.images, 5))
        made.network.get_classifier().train()
        numbers = set()
        for seed in range(8):
            made.dropouts[0].draw(torch.Generator().manual_seed(seed))
            numbers.add(number := int(made.dropouts[0].drawn))
            torch.testing.assert_close(made(given.images), truncated(made.network, given.images, number))
        assert len(numbers) > 1
        assert numbers < set(range(1, WIDTH + 1))

    def test_features_beyond_the_drawn_number_get_no_gradient(self):
        made, given = ready(module(sigma=2.0)), batch()
        made.network.get_classifier().train()
        made.training_step(given, 0).backward()
        rows = made.network.get_classifier().weight.grad.abs().sum(0)
        number = int(made.dropouts[0].drawn)
        assert number < WIDTH
        assert bool((rows[:number] > 0).all())
        assert not rows[number:].any()

    def test_the_number_of_features_is_the_best_on_the_validation_split_and_saved(self, tmp_path):
        made, source = module(sigma=2.0), data(val_fraction=0.25)
        run = trainer(3, callbacks=[AtStep(7, tmp_path / "a.ckpt")])
        run.fit(made, source)
        found = made.predict_val("features", "labels")
        classifier = made.network.get_classifier()
        hits = []
        for k in range(1, WIDTH + 1):
            logits = found["features"][:, :k] @ classifier.weight[:, :k].T + classifier.bias
            hits.append(float((logits.argmax(1) == found["labels"]).double().mean()) - 1e-5 * (k - 1))
        assert int(made.dropouts[0].kept) == 1 + max(range(WIDTH), key=hits.__getitem__)
        assert int(made.dropouts[0].kept) != 2  # sigma, that of a run without a validation split
        again = module(sigma=2.0)
        trainer(3).fit(again, data(val_fraction=0.25), ckpt_path=tmp_path / "a.ckpt")
        assert same(made.network, again.network)
        assert same(made.dropouts, again.dropouts)

    @pytest.mark.parametrize(("accuracy", "number"), [((0.2, 0.5, 0.5, 0.7, 0.7), 4), ((0.2, 0.5, 0.5, 0.7, 0.8), 5)])
    def test_the_smallest_of_equally_good_numbers_is_chosen(self, accuracy, number, monkeypatch):
        monkeypatch.setattr("sanm_lightning.methods.nested.truncated_accuracy", lambda *_: torch.tensor(accuracy))
        made = module(sigma=2.0)
        trainer(1, limit_train_batches=1).fit(made, data(val_fraction=0.25))
        assert int(made.dropouts[0].kept) == number

    def test_a_hook_of_a_subclass_without_super_does_not_prevent_the_choice(self, monkeypatch):
        class Own(Nested):
            def on_validation_start(self):
                pass

        chosen = []
        monkeypatch.setattr(Nested, "choose_num_features", lambda self: chosen.append(self.current_epoch))
        trainer(2).fit(Own(**SMALL, sigma=3.0), data(val_fraction=0.25))
        assert chosen == [0, 1]

    def test_without_a_validation_split_it_is_sigma(self):
        made = module(sigma=3.4)
        trainer(1).fit(made, data())
        assert int(made.dropouts[0].kept) == 3

    def test_the_activation_map_is_that_of_the_truncated_logits(self):
        made, plain = module(sigma=2.0, sanm=SANM(seed=0)), module(sigma=None, sanm=SANM(seed=0))
        assert made.sanm.maps.chosen is grad_cam
        assert plain.sanm.maps.chosen is cam

    def test_a_rate_that_increases_and_frozen_batch_norm(self):
        made = module(lr_warmup_steps=4, freeze_batch_norm=True)
        (stage,) = made.stages()
        assert [stage.ramp(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        before = {name: value.clone() for name, value in made.state_dict().items() if isinstance(value, torch.Tensor)}
        trainer(1).fit(made, data())
        assert stage.frozen
        for name in stage.frozen:
            for key in [key for key in before if key.startswith(f"{name}.")]:
                assert torch.equal(before[key], made.state_dict()[key])
        assert not torch.equal(before["network.network.fc.weight"], made.network.network.fc.weight)

    def test_a_rate_increases_over_steps_of_any_number_per_epoch(self):
        rates = []

        class Watch(L.Callback):
            def on_train_start(self, trainer, pl_module):
                note = lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"] / 0.02)  # noqa: E731
                trainer.optimizers[0].register_step_pre_hook(note)

        steps = GradientAccumulationScheduler({0: 1, 1: 2})
        trainer(3, callbacks=[steps, Watch()]).fit(module(lr_warmup_steps=7), data())
        assert rates == pytest.approx([min(1.0, (step + 1) / 7) for step in range(8)])
        rates.clear()
        samples = Endless()
        trainer(2, callbacks=[Watch()]).fit(module(lr_warmup_steps=5), DataLoader(samples, 8))
        assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])

    @pytest.mark.parametrize("average", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.5)], ids=["mean", "ema"])
    def test_averages_of_the_weights_leave_the_number_of_features(self, average, tmp_path):
        class Watch(L.Callback):
            def on_validation_batch_start(self, trainer, pl_module, *_):
                seen.append(int(pl_module.dropouts[0].kept))

        runs = []
        for callbacks in ([], [average()]):
            made, seen = module(), []
            run = trainer(6, callbacks=[*callbacks, Watch()])
            run.fit(made, data(val_fraction=0.2))
            runs.append((seen, int(made.dropouts[0].kept)))
        assert runs[0] == runs[1]
        assert len(set(runs[0][0])) > 2
        run.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert int(saved["state_dict"]["dropouts.0.kept"]) == runs[0][1]

    def test_a_network_without_a_linear_classifier_is_refused(self):
        class Two(nn.Sequential):
            in_features = WIDTH

        made = CrossEntropy(**SMALL).network.network
        made.fc = Two(nn.Linear(WIDTH, C), nn.Identity())
        with pytest.raises(
            ValueError, match="expected a network with a linear classifier on 16 features for Nested, got Two"
        ):
            Nested(C, image_size=(16, 16), network=made)

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda: Nested(**SMALL, sigma=0.0), "expected sigma > 0 or null, got 0.0"),
            (lambda: Nested(**SMALL, num_features=17), "expected num_features in 1 to 16, got 17"),
            (lambda: NestedCoTeaching(**SMALL), r"expected noise_rate in \[0, 1\), got None; set noise_rate \(--model"),
            (
                lambda: NestedCoTeaching(**SMALL, noise_rate=0.2, finetune_drop=2.0),
                r"expected finetune_drop in \[0, 1\], got 2.0; use the default",
            ),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, make, sentence):
        with pytest.raises(ValueError, match=sentence):
            make()


class TestNestedCoTeaching:
    def test_a_step_trains_each_network_on_the_small_losses_of_the_other_half(self):
        made, given = ready(module(NestedCoTeaching, noise_rate=0.4, num_features=6), 1), batch(7)
        loss, total = made.training_step(given, 0), 0.0
        for number in (0, 1):
            rows = list(range(3 * number, 3 * number + 3))  # the last of 7 samples is left out
            ranked = predictions(made.networks[number], given.images[rows])
            order = sorted(rows, key=lambda i: -math.log(ranked[i - rows[0]][int(given.labels[i])]))
            taught = predictions(made.networks[1 - number], given.images)
            total += sum(-math.log(taught[i][int(given.labels[i])]) for i in order[:1])  # int(.6 * 3) = 1
            quality = made.label_quality()[given.index[order]]
            assert quality.tolist() == pytest.approx([1.0, 0.5, 0.0])
        assert float(loss.detach()) == pytest.approx(total, rel=1e-4)

    def test_the_first_stage_is_nested_dropout_of_both_networks(self):
        made, given = ready(module(NestedCoTeaching, noise_rate=0.4, sigma=None)), batch()
        losses = [F.cross_entropy(network(given.images), given.labels) for network in made.networks]
        torch.testing.assert_close(made.training_step(given, 0), sum(losses))

    def test_batch_norm_is_frozen_in_the_second_stage_only(self):
        made, found = module(NestedCoTeaching, noise_rate=0.4), {}

        class Watch(AtStep):
            def on_train_batch_end(self, trainer, pl_module, *_):
                norm = pl_module.get_submodule(pl_module.norms[0])
                found[trainer.global_step] = [norm.weight.detach().clone(), norm.running_mean.clone()]

        trainer(2, callbacks=[Watch(0, "")]).fit(made, data())
        assert not torch.equal(found[1][0], found[4][0])
        for step in range(5, 9):
            assert all(torch.equal(one, other) for one, other in zip(found[step], found[4], strict=True))

    def test_the_rate_of_the_second_stage_falls_once(self):
        *_, last = module(NestedCoTeaching, noise_rate=0.4, finetune_drop=0.25).stages()
        assert last.lr == 0.001
        assert [last.factor(step, 8) for step in range(4)] == pytest.approx([1.0, 1.0, 0.1, 0.1])

    def test_batches_without_index_are_refused(self):
        made = ready(module(NestedCoTeaching, noise_rate=0.4), 1)
        with pytest.raises(ValueError, match="expected batches with an index for NestedCoTeaching"):
            made.training_step(batch()._replace(index=None), 0)
