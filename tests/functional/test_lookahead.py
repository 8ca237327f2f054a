"""Look-ahead steps against explicit loops over parameters and samples, in closed form, and what they leave alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sanm_lightning.functional import (
    LookaheadStep,
    class_sets,
    directional_derivative,
    forward_kl,
    gradients,
    lookahead,
    meta_gradients,
    meta_weights,
    neighbor_labels,
    network_at,
    rms_normalize,
    row_mixup,
    sgd_step,
    trainable,
)
from sanm_lightning.models import SmallCNN

B, C = 6, 4


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallCNN(C, width=2)


@pytest.fixture
def images():
    return torch.rand(B, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(B) % C
ONE_HOT = F.one_hot(LABELS, C).float()


def copied(network, parameters):
    """A network of its own with these values."""
    twin = SmallCNN(C, width=2)
    twin.load_state_dict({**network.state_dict(), **{name: value.detach() for name, value in parameters.items()}})
    return twin.train(network.training)


class TestLookahead:
    def test_is_a_step_of_sgd(self, network, images):
        parameters = trainable(network)
        twin = copied(network, parameters)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.3)
        F.cross_entropy(twin(images), LABELS).backward()
        optimizer.step()
        ahead = lookahead(parameters, gradients(F.cross_entropy(network(images), LABELS), parameters), 0.3)
        for name, value in twin.named_parameters():
            torch.testing.assert_close(ahead[name], value)
        torch.testing.assert_close(network_at(network, ahead, images), copied(network, ahead)(images))

    def test_leaves_parameters_their_gradients_and_running_statistics(self, network, images):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        parameters = trainable(network)
        loss = F.cross_entropy(network_at(network, parameters, images), LABELS)
        network_at(network, lookahead(parameters, gradients(loss, parameters, True), 0.3), images).sum().backward()
        directional_derivative(network, parameters, parameters, images)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert all(value.grad is not None for value in parameters.values()), "the last backward pass reaches them"

    @pytest.mark.parametrize("second_order", [False, True])
    def test_the_gradient_of_a_loss_after_a_step(self, network, images, second_order):
        """For each parameter, against differences of the loss after two explicit steps."""
        network = network.double().eval()
        images, lr, step = images.double(), 0.5, 1e-5
        parameters = trainable(network)

        def after(moved, frozen=None):
            twin = copied(network, moved).double().eval()
            found = torch.autograd.grad(F.cross_entropy(twin(images), LABELS), list(twin.parameters()))
            with torch.no_grad():
                for number, value in enumerate(twin.parameters()):
                    value -= lr * (found[number] if frozen is None else frozen[number])
                return float(F.cross_entropy(twin(images), LABELS.flip(0)))

        fixed = torch.autograd.grad(F.cross_entropy(network(images), LABELS), list(parameters.values()))
        steps = gradients(F.cross_entropy(network(images), LABELS), parameters, second_order)
        loss = F.cross_entropy(network_at(network, lookahead(parameters, steps, lr), images), LABELS.flip(0))
        found = gradients(loss, parameters)
        for name, value in parameters.items():
            place = (0,) * value.ndim
            sides = []
            for sign in (1, -1):
                moved = {key: part.detach().clone() for key, part in parameters.items()}
                moved[name][place] += sign * step
                sides.append(after(moved, None if second_order else fixed))
            assert float(found[name][place]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3, abs=1e-6)

    def test_frozen_and_unused_parameters_have_no_step(self, network, images):
        network.layers[0].weight.requires_grad_(False)
        network.unused = nn.Parameter(torch.ones(3))
        parameters = trainable(network)
        found = gradients(F.cross_entropy(network(images), LABELS), parameters)
        assert "layers.0.weight" not in found
        assert found["unused"].tolist() == [0, 0, 0]


def test_the_derivative_along_a_direction_is_that_of_differences(network, images):
    network, images = network.double(), images.double()
    parameters = trainable(network)
    direction = {name: torch.randn_like(value) for name, value in parameters.items()}
    logits, slopes = directional_derivative(network, parameters, direction, images)
    sides = [network_at(network, lookahead(parameters, direction, -sign * 1e-6), images) for sign in (1, -1)]
    torch.testing.assert_close(logits, network_at(network, parameters, images).detach().float())
    torch.testing.assert_close(slopes, ((sides[0] - sides[1]) / 2e-6).detach().float(), rtol=1e-3, atol=1e-4)
    assert not slopes.requires_grad


class TestMetaGradients:
    @pytest.fixture
    def given(self, network, images):
        torch.manual_seed(2)
        guesses = torch.randn(B, C).softmax(1)
        return {
            "network": network, "images": images, "labels": ONE_HOT, "guesses": guesses,
            "probe_images": torch.rand(5, 3, 8, 8), "probe_labels": torch.arange(5) % C, "trust": 0.9,
        }  # fmt: skip

    @pytest.mark.parametrize("pulled", [False, True])
    def test_both_orders_are_equal(self, given, pulled):
        network = given["network"]
        pull = {name: 0.1 * torch.randn_like(value) for name, value in trainable(network).items()} if pulled else {}
        step = LookaheadStep(0.2, pull, 0.01 * pulled)
        found = [
            meta_gradients(**given, logits=network(given["images"]), step=step, second_order=second)
            for second in (False, True)
        ]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            assert not one.requires_grad
            assert float(one.abs().max()) > 1e-4

    @pytest.mark.parametrize("second_order", [False, True])
    def test_they_are_those_of_the_loss_of_the_probe_set_after_two_explicit_steps(self, given, second_order):
        network, lr, shift = given["network"].double(), 0.2, 1e-4
        given = {
            key: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for key, v in given.items()
        }
        found = meta_gradients(
            **given, logits=network(given["images"]), step=LookaheadStep(lr), second_order=second_order
        )

        def probe_loss(weights, trusts):
            twin = copied(network, trainable(network)).double()
            log_probs = twin(given["images"]).log_softmax(1)
            targets = trusts[:, None] * given["labels"] + (1 - trusts[:, None]) * given["guesses"]
            loss = sum(-weights[i] * (targets[i] * log_probs[i]).sum() for i in range(B))
            steps = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for value, part in zip(twin.parameters(), steps, strict=True):
                    value -= lr * part
                return float(F.cross_entropy(twin(given["probe_images"]), given["probe_labels"]))

        weights, trusts = torch.full((B,), 1 / B).double(), torch.full((B,), 0.9).double()
        for i in range(B):
            moved = torch.zeros(B).double()
            moved[i] = shift
            by_weight = (probe_loss(weights + moved, trusts) - probe_loss(weights - moved, trusts)) / (2 * shift)
            by_trust = (probe_loss(weights, trusts + moved) - probe_loss(weights, trusts - moved)) / (2 * shift)
            assert float(found[0][i]) == pytest.approx(by_weight, rel=2e-2, abs=2e-4)
            assert float(found[1][i]) == pytest.approx(by_trust, rel=2e-2, abs=2e-4)

    def test_weights_are_the_useful_gradients(self):
        weights = meta_weights(torch.tensor([-3.0, 1.0, -1.0, 0.0]))
        torch.testing.assert_close(weights, torch.tensor([0.75, 0, 0.25, 0]), rtol=1e-4, atol=0)
        assert meta_weights(torch.ones(3)).tolist() == [0, 0, 0]

    def test_the_step_has_momentum_and_weight_decay_of_sgd_only(self, network, images):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5, weight_decay=0.01)
        F.cross_entropy(network(images), LABELS).backward()
        optimizer.step()
        step = sgd_step(network, [optimizer], 0.3, 0.9)
        assert (step.lr, step.weight_decay) == (0.3, 0.01)
        for name, value in network.named_parameters():
            torch.testing.assert_close(
                step.pull[name], 0.01 * value.detach() + 0.9 * optimizer.state[value]["momentum_buffer"]
            )
        assert sgd_step(network, [torch.optim.AdamW(network.parameters())], 0.3, 0.9) == LookaheadStep(0.3, {}, 0.0)


class TestNeighborLabels:
    def perturbed(self, **options):
        torch.manual_seed(0)
        features = torch.randn(20, 3)
        labels = torch.arange(20)  # of its own for each sample: a label names the sample that it comes from
        generator = torch.Generator().manual_seed(0)
        arguments = {"copies": 50, "fraction": 0.5, "k": 3, **options}
        return features, neighbor_labels(labels, features, generator=generator, **arguments)

    def test_half_of_the_samples_take_the_label_of_a_near_neighbor_never_their_own(self):
        features, copies = self.perturbed()
        assert copies.shape == (50, 20)
        assert (copies != torch.arange(20)).sum(1).tolist() == [10] * 50
        for i in range(20):
            distance = [float((features[i] - other).square().sum()) for other in features]
            nearest = sorted(set(range(20)) - {i}, key=distance.__getitem__)[:3]
            assert set(copies[:, i].tolist()) == {i, *nearest}

    def test_equal_features_do_not_give_a_sample_its_own_label(self):
        labels = neighbor_labels(torch.arange(5), torch.zeros(5, 2), 9, 1.0, 2, torch.Generator().manual_seed(0))
        assert bool((labels != torch.arange(5)).all())

    @pytest.mark.parametrize("size", [1, 2])
    def test_a_small_batch_uses_the_neighbors_that_it_has(self, size):
        labels = neighbor_labels(torch.arange(size), torch.zeros(size, 2), 2, 1.0, 10, torch.Generator())
        assert labels.tolist() == [list(range(size))[::-1]] * 2


def test_rows_are_mixed_each_with_its_own_weight():
    images, targets = torch.rand(5, 3, 2, 2), torch.rand(5, C).softmax(1)
    mixed = row_mixup(images, targets, torch.Generator().manual_seed(0), 0.5)
    half = torch.rand(5, generator=torch.Generator().manual_seed(0)).square() / 2
    for i, partner in enumerate(mixed.partners.tolist()):
        weight = float(torch.maximum(half, 1 - half)[i])
        torch.testing.assert_close(mixed.images[i], weight * images[i] + (1 - weight) * images[partner])
        torch.testing.assert_close(mixed.targets[i], weight * targets[i] + (1 - weight) * targets[partner])
    assert len(set(mixed.lam.tolist())) == 5


def test_the_divergence_is_that_of_the_target_from_the_prediction():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, C), torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]])
    expected = F.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)
    torch.testing.assert_close(forward_kl(logits, targets), expected)
    assert forward_kl(targets[2:].log(), targets[2:]).tolist() == pytest.approx([0.0], abs=1e-6)


def test_normalized_logits_have_a_mean_square_of_one():
    logits = rms_normalize(torch.randn(7, C) * 5)
    assert float(logits.square().mean()) == pytest.approx(1.0)


class TestClassSets:
    def test_members_come_in_turn_and_no_set_has_one_twice(self):
        members, sizes = torch.arange(9), torch.tensor([7, 0, 2])  # of classes 0 and 2
        drawn = class_sets(members, sizes, 8, 3, torch.Generator().manual_seed(0))
        first = [row for row in drawn.tolist() if row[0] < 7]
        assert len(first) == 4
        assert all(max(row) < 7 and len(set(row)) == 3 for row in first)
        assert [len(set(first[i] + first[i + 1])) for i in (0, 2)] == [6, 6]

    def test_a_class_with_fewer_members_than_a_set_repeats_them(self):
        drawn = class_sets(torch.arange(9), torch.tensor([7, 0, 2]), 8, 3, torch.Generator().manual_seed(0))
        small = [row for row in drawn.tolist() if row[0] >= 7]
        assert len(small) == 4
        assert all(set(row) == {7, 8} for row in small)
