"""MLNT, IEG and the method after MetaCleaner against explicit steps and loops, in their limits, and their cost."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.batch import EpochPlan
from sanm_lightning.data import Toy
from sanm_lightning.functional import guessed_labels, meta_gradients, neighbor_labels, row_mixup
from sanm_lightning.functional.reweighting import LookaheadStep
from sanm_lightning.methods import IEG, MLNT, CrossEntropy, MetaCleaner
from tests.methods.reference import SMALL, C, N, batch, predictions, ready
from tests.methods.toy import data, trainer

PROBE = str(Path(__file__).with_name("probe.csv"))  # samples 0 to 3, of classes 0 to 3
META = {"warmup_epochs": 1, "num_lookaheads": 3, "neighbors": 2, "ramp_steps": 0, "meta_lr": 0.7, "meta_weight": 0.5}


def by_hand(parameters: dict, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of the small network in evaluation mode, layer by layer, from given parameters."""
    x = (images - network.mean) / network.std
    for number, stride in ((0, 2), (3, 2), (6, 1), (9, 1)):
        norm = network.network.layers[number + 1]
        name = f"network.layers.{number + 1}"
        x = F.conv2d(x, parameters[f"network.layers.{number}.weight"], stride=stride, padding=1)
        scale = parameters[f"{name}.weight"] / (norm.running_var + norm.eps).sqrt()
        x = (x - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + parameters[f"{name}.bias"].view(-1, 1, 1)
        x = x.relu()
    return F.linear(x.mean((2, 3)), parameters["network.fc.weight"], parameters["network.fc.bias"])


def count_images(module: nn.Module) -> list[int]:
    """Note the number of images of every forward pass of a network."""
    sizes: list[int] = []
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def watched(module: nn.Module) -> list:
    """Note the arguments and views of SANM."""
    seen = []
    forward = module.sanm.forward
    module.sanm.forward = lambda *args, **options: seen.append((args, forward(*args, **options))) or seen[-1][1]
    return seen


class TestMLNT:
    @pytest.mark.parametrize("second_order", [False, True])
    def test_the_gradient_of_a_step_is_that_of_two_explicit_steps(self, second_order):
        torch.manual_seed(0)
        module, given = ready(MLNT(**SMALL, **META, second_order=second_order), 1), batch(8)
        with torch.no_grad():
            for value in module.teacher.parameters():
                value.add_(0.1 * torch.randn_like(value))
        loss = module.training_step(given, 0)
        loss.backward()
        values = {name: part.detach().clone().requires_grad_() for name, part in module.network.named_parameters()}
        logits = by_hand(values, module.network, given.images)
        teacher = torch.tensor(predictions(module.teacher.module, given.images))
        with torch.no_grad():
            features = module.mentor.forward_head(module.mentor.forward_features(given.images), pre_logits=True)
        copies = neighbor_labels(given.labels, features, 3, 0.5, 2, module.stream("perturb"))
        assert bool((copies != given.labels).any())
        expected = F.cross_entropy(logits, given.labels)
        for labels in copies:
            inner = F.cross_entropy(logits, labels)
            steps = torch.autograd.grad(inner, list(values.values()), create_graph=second_order, retain_graph=True)
            ahead = {name: value - 0.7 * step for (name, value), step in zip(values.items(), steps, strict=True)}
            log_probs = by_hand(ahead, module.network, given.images).log_softmax(1)
            expected = expected + 0.5 / 3 * (teacher * (teacher.log() - log_probs)).sum(1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(expected, list(values.values()))
        for (name, value), part in zip(module.network.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(
                value.grad, part, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_without_look_ahead_it_is_cross_entropy(self):
        for options in ({"num_lookaheads": 0}, {"meta_weight": 0.0}):
            module, given = ready(MLNT(**SMALL, **{**META, **options}), 1), batch()
            loss = module.training_step(given, 0)
            torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), given.labels))

    @pytest.mark.parametrize(("released", "scale"), [(False, 1), (True, C)])
    def test_with_steps_of_length_0_it_is_plain_agreement_with_the_teacher(self, released, scale):
        torch.manual_seed(0)
        module, given = ready(MLNT(**SMALL, **{**META, "meta_lr": 0.0, "released_kl": released}), 1), batch()
        with torch.no_grad():
            module.teacher.module.get_classifier().weight[0].add_(5.0)
        logits, teacher = module.network(given.images), module.teacher(given.images).softmax(1)
        agreement = F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
        assert float(agreement.detach()) > 1e-3
        expected = F.cross_entropy(logits, given.labels) + 0.5 * agreement / scale
        torch.testing.assert_close(module.training_step(given, 0), expected)

    def test_the_first_stage_is_cross_entropy_and_ends_with_a_mentor_and_a_teacher(self):
        torch.manual_seed(0)
        module, given = ready(MLNT(**SMALL, **META)), batch()
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), given.labels))
        with torch.no_grad():
            module.network.get_classifier().weight.add_(1.0)
        module.begin_stage()
        for copied in (module.mentor, module.teacher.module):
            assert torch.equal(copied(given.images), module.network(given.images))
            assert not any(value.requires_grad for value in copied.parameters())

    def test_the_teacher_follows_the_network_and_averages_after_the_first_stage(self):
        torch.manual_seed(0)
        module, before = MLNT(**SMALL, **{**META, "ramp_steps": 3}), []

        def note(value=None):
            before.append(
                (module.network.get_classifier().weight.clone(), module.teacher.module.get_classifier().weight.clone())
            )

        module.on_train_batch_end = lambda *_: note()
        trainer(2).fit(module, data())  # two epochs of four steps
        for network, teacher in before[:4]:
            assert torch.equal(network, teacher)
        for step, decay in zip(range(4, 8), (0.99, 0.99, 0.999, 0.999), strict=True):
            network, teacher = before[step]
            torch.testing.assert_close(teacher, decay * before[step - 1][1] + (1 - decay) * network)

    @pytest.mark.parametrize(("sanm", "passes"), [(None, 1 + 3), (SANM(mu=0.5, seed=0), 2 + 1 + 3)])
    def test_the_cost_in_forward_passes_and_one_update_of_the_running_statistics(self, sanm, passes):
        """Of the network: one, and M; under SANM one for the activation map and one of unmasked images."""
        module, given = ready(MLNT(**SMALL, **META, sanm=sanm), 1).train(), batch()
        sizes, others = count_images(module.network), [count_images(module.mentor), count_images(module.teacher)]
        module.training_step(given, 0)
        assert sizes == [6] * passes
        assert others == [[6], [6]]
        norm = next(part for part in module.network.modules() if isinstance(part, nn.BatchNorm2d))
        assert int(norm.num_batches_tracked) == 1

    def test_running_statistics_are_those_of_cross_entropy(self):
        found = []
        for make in (lambda: MLNT(**SMALL, **META), lambda: CrossEntropy(**SMALL)):
            torch.manual_seed(0)
            module = ready(make(), 1).train()
            module.training_step(batch(), 0)
            found.append(dict(module.network.named_buffers()))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])

    def test_masks_follow_the_teacher_and_the_look_ahead_is_on_unmasked_images(self, monkeypatch):
        torch.manual_seed(0)
        module, given, ahead = ready(MLNT(**SMALL, **META, sanm=SANM(mu=0.5, seed=0)), 1), batch(), []
        plain = MLNT.training_step.__globals__["network_at"]
        monkeypatch.setitem(
            MLNT.training_step.__globals__, "network_at", lambda *args: ahead.append(args[2]) or plain(*args)
        )
        seen = watched(module)
        module.training_step(given, 0)
        quality = module.teacher(given.images).softmax(1)[torch.arange(6), given.labels]
        torch.testing.assert_close(seen[0][1].ratio, 0.5 * (1 - quality), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.label_quality()[given.index], quality)
        assert not torch.equal(seen[0][1].images, given.images)
        assert len(ahead) == 4
        assert all(images is given.images for images in ahead)

    def test_batches_without_index_are_learned_from(self):
        module = ready(MLNT(**SMALL, **META), 1)
        assert module.training_step(batch()._replace(index=None), 0).requires_grad
        assert module.label_quality() is None


def two_views(size: int = 6):
    """Samples 4 to 4 + size in two views, followed by as many probe samples."""
    given, known = batch(size), torch.arange(size) % 4
    weak = torch.cat([given.images, torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(5))])
    labels = torch.cat([given.labels, (known + 1) % C])  # those of the training set, which are not the known ones
    return given._replace(
        images=weak, labels=labels, index=torch.cat([given.index, known]), views=(weak, weak.flip(-1) ** 4)
    )


def ieg(**options):
    torch.manual_seed(0)
    module = ready(IEG(**SMALL, probe=PROBE, **options), 1)
    module.samples.update(torch.arange(4), labels=torch.arange(4))
    return module


class TestIEG:
    def test_the_loss_of_a_step(self):
        """Section 13 of the code, one sample at a time."""
        module, rows = ieg(guess_weight=2.0, consistency_weight=3.0), two_views()
        with torch.no_grad():
            module.network.get_classifier().weight.mul_(100.0)  # views with different predictions
        loss = module.training_step(rows, 0)
        weak, strong, known = rows.images[:6], rows.views[1][:6], rows.index[6:]
        one, other = (module.network(view).detach() for view in (weak, strong))
        guesses = torch.zeros(6, C)
        for i in range(6):
            for logits in (one, other):
                guesses[i] += (logits / logits.square().mean().sqrt()).softmax(1)[i] / 2
            guesses[i] = guesses[i].square() / guesses[i].square().sum()
        labels = F.one_hot(rows.labels[:6], C).float()
        by_weight, by_trust = meta_gradients(
            module.network, weak, module.network(weak), labels, guesses, rows.images[6:], known, 0.9,
            LookaheadStep(0.1), second_order=True,
        )  # fmt: skip
        useful = [max(0.0, -float(value)) for value in by_weight]
        weights = [value / (sum(useful) + 1e-5) for value in useful]
        expected = 0.0
        for i in range(6):
            log_p = one[i].log_softmax(0)
            chosen = labels[i] if float(by_trust[i]) < 0 else guesses[i]
            expected -= 0.5 / 6 * float((chosen * log_p).sum())
            expected -= 0.5 * weights[i] * float(((0.9 * labels[i] + 0.1 * guesses[i]) * log_p).sum())
            p = one[i].softmax(0)
            divergence = float((p * (p.log() - other[i].log_softmax(0))).sum())
            assert divergence > 1e-3
            expected += 3.0 / 6 * divergence
        generator = module.stream("mixup")
        drawn = torch.randint(6, (6,), generator=generator)
        mixed = row_mixup(
            torch.cat([rows.images[6:][drawn], weak, strong]),
            torch.cat([F.one_hot(known[drawn], C).float(), guesses, guesses]), generator, 0.5,
        )  # fmt: skip
        blocks = module.network(mixed.images).detach().split(6)
        for block, targets, factor in zip(blocks, mixed.targets.split(6), (1.0, 1.0, 1.0), strict=True):
            log_p = (block / block.square().mean().sqrt()).log_softmax(1)
            part = -float((targets * log_p).sum()) / 6
            expected += factor * part if block is blocks[0] else 2.0 * part / 2
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        quality = [min(1.0, 6 * w) * (float(t) < 0) for w, t in zip(weights, by_trust, strict=True)]
        assert module.label_quality()[rows.index[:6]].tolist() == pytest.approx(quality, rel=1e-2, abs=1e-3)
        assert len({round(value, 3) for value in quality}) > 1

    def test_with_equal_weights_it_is_the_mean_of_two_cross_entropies(self, monkeypatch):
        module, rows = ieg(consistency_weight=0.0), two_views()
        monkeypatch.setattr(module, "judge", lambda *_: (torch.full((6,), 1 / 6), torch.ones(6)))
        monkeypatch.setattr(module, "mixed_loss", lambda *_: 0.0)
        loss = module.training_step(rows, 0)
        logits, other = module.network(rows.images[:6]), module.network(rows.views[1][:6])
        labels = F.one_hot(rows.labels[:6], C).float()
        mixed = 0.9 * labels + 0.1 * guessed_labels([logits, other], 0.5)
        torch.testing.assert_close(loss, (F.cross_entropy(logits, labels) + F.cross_entropy(logits, mixed)) / 2)

    @pytest.mark.parametrize(("second_order", "sizes"), [(False, [6, 6, 6, 6, 18]), (True, [6, 6, 6, 18])])
    def test_the_cost_in_forward_passes_and_three_updates_of_the_running_statistics(self, second_order, sizes):
        """Two views, the probe set, the forward-mode pass of the first order, and three blocks of mixed images."""
        module = ieg(second_order=second_order).train()
        found = count_images(module.network)
        module.training_step(two_views(), 0)
        assert found == sizes
        norm = next(part for part in module.network.modules() if isinstance(part, nn.BatchNorm2d))
        assert int(norm.num_batches_tracked) == 3

    def test_both_orders_take_the_same_step(self):
        found = []
        for second_order in (False, True):
            module = ieg(second_order=second_order).train()
            module.training_step(two_views(), 0).backward()
            found.append([value.grad for value in module.network.parameters()])
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)

    def test_only_views_with_guessed_labels_are_masked_by_weight_and_choice(self, monkeypatch):
        module, rows = ieg(sanm=SANM(mu=0.5, seed=0), warmup_epochs=0), two_views()
        weights, chosen = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0]), torch.tensor([1.0, 1, 1, 1, 0, 0])
        monkeypatch.setattr(module, "judge", lambda *_: (weights, chosen))
        seen = watched(module)
        module.training_step(rows, 0)
        ((_, images, targets, *_), views) = seen[0]
        assert torch.equal(images, torch.cat([rows.images[:6], rows.views[1][:6]]))
        assert torch.equal(targets[:6], targets[6:])
        assert not torch.equal(targets, targets.round())
        quality = torch.tensor([0.0, 0.6, 1.0, 1.0, 0.0, 0.0])
        torch.testing.assert_close(views.ratio, 0.5 * (1 - quality).repeat(2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.label_quality()[rows.index[:6]], quality)

    def test_rows_are_training_samples_followed_by_as_many_probe_samples(self):
        module = ieg()
        module.probe_positions = torch.arange(4)
        plans = [EpochPlan(2, 3, 5, N, rank, 2, lambda _: torch.arange(N)) for rank in (0, 1)]
        rows = [module.epoch_batches(plan) for plan in plans]
        again = module.epoch_batches(plans[0])
        assert torch.equal(rows[0], again)
        first = torch.cat([part[:, :5].flatten() for part in rows])
        assert rows[0].shape == (3, 10)
        assert len(set(first.tolist())) == min(len(first), N - 4)
        assert not set(first.tolist()) & set(range(4))
        assert set(torch.cat([part[:, 5:].flatten() for part in rows]).tolist()) == set(range(4))

    def test_probe_samples_have_the_quality_of_a_comparison_with_the_known_label(self):
        torch.manual_seed(0)
        module, source = IEG(**SMALL, probe=PROBE), data()
        trainer(1).fit(module, source)
        same = (source.labels[:4] == torch.arange(4)).float()
        assert torch.equal(module.label_quality()[:4], same)
        assert torch.equal(module.samples.labels[:4], torch.arange(4))
        assert torch.equal(module.samples.labels[4:], source.labels[4:])

    def test_the_prediction_is_that_of_the_averaged_network(self):
        torch.manual_seed(0)
        module = IEG(**SMALL, probe=PROBE)
        weights = []
        module.on_train_batch_end = lambda *_: weights.append(
            [net.get_classifier().weight.clone() for net in (module.network, module.average.module)]
        )
        trainer(1).fit(module, data())
        assert torch.equal(*weights[0])  # copied
        for step in range(1, 4):
            decay = (1 + step) / (10 + step)
            torch.testing.assert_close(weights[step][1], decay * weights[step - 1][1] + (1 - decay) * weights[step][0])
        images = torch.rand(3, 3, 16, 16)
        module.eval()
        assert torch.equal(module(images), module.average.module(images))
        buffers = zip(module.average.module.buffers(), module.network.buffers(), strict=True)
        assert all(torch.equal(one, other) for one, other in buffers)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (
                "index,label\n0,0\n64,1\n",
                "some of the 64 training samples .* 1 rows of unknown samples \\(first: '64'\\)",
            ),
            ("index,label\n0,0\n0,1\n", "1 repeated rows"),
            ("index,label\n0,7\n", "expected labels among the 4 classes"),
            ("index,label\n", "got no rows; write a .csv"),
            ("number,label\n0,1\n", "got none; write a .csv"),
            (
                "index,label\n" + "".join(f"{i},0\n" for i in range(64)),
                "expected training samples beside the probe set",
            ),
        ],
    )
    def test_a_wrong_probe_set_is_refused_before_training(self, text, sentence, tmp_path):
        path = tmp_path / "known.csv"
        path.write_text(text)
        module = IEG(**SMALL, probe=str(path))
        run = trainer(1)
        with pytest.raises(ValueError, match=sentence):
            run.fit(module, Toy(seed=0))
        assert run.global_step == 0

    def test_a_missing_probe_file_is_refused_before_training(self):
        with pytest.raises(FileNotFoundError, match=r"expected a file of known labels in 'no\.csv', got no such file"):
            trainer(1).fit(IEG(**SMALL, probe="no.csv"), Toy(seed=0))


def test_the_trials_of_a_finder_draw_batches_of_ieg_without_its_probe_set():
    finder = L.pytorch.callbacks.LearningRateFinder(num_training_steps=4, early_stop_threshold=None, update_attr=False)
    module = IEG(**SMALL, probe=PROBE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(1, callbacks=[finder])
        run.fit(module, data())
    assert len(finder.optimal_lr.results["loss"]) == 4
    assert module.probe_positions.tolist() == [0, 1, 2, 3]
    assert module.average.steps == run.global_step > 0, "trials update no averaged network"


class TestMetaCleaner:
    def module(self, **options):
        torch.manual_seed(0)
        return ready(MetaCleaner(**SMALL, **{"set_size": 3, **options}), 1)

    def test_the_loss_of_a_step(self):
        """One set and one image at a time."""
        module, given = self.module(temperature=0.5), batch(6, torch.tensor([1, 1, 1, 2, 2, 2]))
        loss = module.training_step(given, 0)
        net = module.network
        with torch.no_grad():
            features = [
                net.forward_head(net.forward_features(image[None]), pre_logits=True)[0] for image in given.images
            ]
            expected, quality = 0.0, []
            for first, label in ((0, 1), (3, 2)):
                members = features[first : first + 3]
                mean = sum(members) / 3
                scores = [
                    module.scorer(torch.cat([part / part.square().mean().sqrt() for part in (member, mean)])) / 0.5
                    for member in members
                ]
                weights = torch.cat(scores).softmax(0)
                clean = sum(weight * member for weight, member in zip(weights, members, strict=True))
                expected -= float(net.get_classifier()(clean).log_softmax(0)[label]) / 2
                quality += [min(1.0, 3 * float(weight)) for weight in weights]
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        assert module.label_quality()[given.index].tolist() == pytest.approx(quality, rel=1e-4)
        assert len(set(quality)) > 2

    def test_sets_of_one_image_are_cross_entropy(self):
        module, given = self.module(set_size=1), batch()
        loss = module.training_step(given, 0)
        torch.testing.assert_close(loss, F.cross_entropy(module.network(given.images), given.labels))

    def test_a_high_temperature_weights_all_images_equally(self):
        weights = self.module(temperature=1e9).weigh(torch.randn(2, 3, 16))
        torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))

    @pytest.mark.parametrize(("batch_size", "size"), [(7, 3), (2, 2)])
    def test_rows_are_sets_of_one_label_with_equal_numbers_for_all_classes(self, batch_size, size):
        module = self.module()
        labels = module.given_labels
        plans = [EpochPlan(1, 6, batch_size, N, rank, 2, lambda _: torch.arange(N)) for rank in (0, 1)]
        rows = torch.stack([module.epoch_batches(plan) for plan in plans])
        sets = rows.view(-1, size)
        assert rows.shape == (2, 6, batch_size // size * size)
        assert bool((labels[sets] == labels[sets][:, :1]).all())
        count = labels[sets][:, 0].bincount(minlength=C)
        assert int(count.max() - count.min()) <= 1
        assert all(len(set(row)) == size for row in sets.tolist())

    def test_masks_follow_the_weights_of_the_last_visit_and_labels_are_averaged_with_the_weights(self):
        module = self.module(sanm=SANM(mu=0.5, seed=0, reconstruct=False), warmup_epochs=0)
        given = batch(6, torch.tensor([1, 1, 1, 2, 2, 2]))
        held = torch.linspace(0, 1, N)
        module.judged.given_quality[:] = held
        seen = watched(module)
        loss = module.training_step(given, 0)
        views = seen[0][1]
        torch.testing.assert_close(views.ratio, 0.5 * (1 - held[given.index]), rtol=1e-4, atol=1e-4)
        net = module.network
        sets = net.forward_head(net.forward_features(views.images), pre_logits=True).view(2, 3, -1)
        weights = module.weigh(sets)
        targets = (weights[..., None] * views.targets.view(2, 3, C)).sum(1).detach()
        clean = (weights[..., None] * sets).sum(1)
        torch.testing.assert_close(loss, F.cross_entropy(net.get_classifier()(clean), targets))
        assert not torch.equal(targets, targets.round())

    def test_a_network_without_a_linear_classifier_is_refused(self):
        with pytest.raises(ValueError, match="expected a network with a linear classifier for MetaCleaner, got Conv2d"):
            MetaCleaner(4, network=Convolutional(), image_size=(16, 16))


class Convolutional(nn.Module):
    """timm's interface with a 1 x 1 convolution as the classifier."""

    num_features = num_classes = 4

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(4, 4, 1)

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3), keepdim=True)
        return (pooled if pre_logits else self.head(pooled)).flatten(1)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: IEG(**SMALL), "expected probe, a file with known labels of some training samples, got None; write"),
        (lambda: IEG(**SMALL, probe=PROBE, meta_lr=0.0), "expected meta_lr > 0, got 0.0"),
        (lambda: IEG(**SMALL, probe=PROBE, trust=1.5), r"expected trust in \(0, 1\], got 1.5"),
        (lambda: IEG(**SMALL, probe=PROBE, guess_weight=-1.0), "expected guess_weight >= 0, got -1.0"),
        (
            lambda: IEG(**SMALL, probe=PROBE, compile_network=True),
            "expected compile_network false for IEG, .* got True",
        ),
        (
            lambda: MLNT(**SMALL, compile_network="aot_eager"),
            "expected compile_network false for MLNT, .* got 'aot_eager'",
        ),
        (lambda: MLNT(**SMALL, num_lookaheads=-1), "expected num_lookaheads >= 0, got -1"),
        (lambda: MLNT(**SMALL, perturbed_fraction=2.0), r"expected perturbed_fraction in \[0, 1\], got 2.0"),
        (lambda: MetaCleaner(**SMALL, set_size=0), "expected set_size >= 1, got 0"),
        (lambda: MetaCleaner(**SMALL, temperature=0.0), "expected temperature > 0, got 0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
