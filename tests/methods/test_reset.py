"""The reset of a network given as a module: what it reinitializes, what it refuses, and the averages that start again."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from sanm_lightning.methods import CoTeaching, CrossEntropy, ForwardCorrection, JointOptim
from sanm_lightning.methods.reset import reinitialize
from tests.methods.renewing import Renewing
from tests.methods.test_every_method import SMALL, AtStep
from tests.methods.toy import data, same, trainer
from tests.trainer.kinds import Net


class Scaled(Net):
    """A network with parameters of its own, as the layer scale of ConvNeXt and the position embedding of ViT."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5), requires_grad=trained)
        self.embedding = nn.Parameter(torch.randn(8, 1, 1), requires_grad=trained)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale + self.embedding


class Resettable(Scaled):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 0.5)
        nn.init.normal_(self.embedding)


def module(kind, network, **options):
    return kind(4, image_size=(16, 16), network=network, warmup_epochs=1, **options)


def test_attention_is_reinitialized_as_it_was_constructed():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    assert reinitialize(layer) == []
    bound = (6 / (8 + 3 * 8)) ** 0.5  # Xavier
    assert 0.5 * bound < layer.self_attn.in_proj_weight.abs().max() < bound
    assert not layer.self_attn.in_proj_bias.any()


def test_parameters_without_reset_keep_their_values_and_are_named():
    network = Scaled()
    before = copy.deepcopy(network)
    assert reinitialize(network) == ["scale", "embedding"]
    assert torch.equal(network.embedding, before.embedding)
    assert not torch.equal(network.fc.weight, before.fc.weight)


@pytest.mark.parametrize(
    ("kind", "options"), [(JointOptim, {"update_epochs": 1}), (ForwardCorrection, {}), (Renewing, {})]
)
def test_a_network_that_cannot_be_reinitialized_is_refused_before_training(kind, options):
    made = module(kind, Scaled(), **options)
    before, stream = copy.deepcopy(made.network.state_dict()), torch.get_rng_state()
    sentence = (
        f"expected a network whose modules reinitialize all parameters by reset_parameters for {kind.__name__}, which "
        "reinitializes it during training, got Scaled, which keeps scale, embedding; pass the name of a timm model, or define"
    )
    run = trainer(3)
    with pytest.raises(ValueError, match=sentence):
        run.fit(made, data())
    assert run.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in made.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("head_only", [False, True])
def test_the_check_before_training_changes_neither_the_network_nor_the_stream(head_only):
    made = module(Renewing, Resettable())
    made.network(torch.rand(8, 3, 16, 16))  # batch statistics
    before, stream = copy.deepcopy(made.network), torch.get_rng_state()
    made.check_reset(head_only=head_only)
    assert same(made.network, before)
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("network", [Net, Resettable, lambda: Scaled(trained=False)], ids=["plain", "own", "constant"])
def test_a_network_that_can_be_reinitialized_trains(network):
    made = module(JointOptim, network(), update_epochs=1)
    run = trainer(3)
    run.fit(made, data())
    assert run.current_epoch == 3


def test_a_stage_that_is_not_reached_is_not_refused():
    run = trainer(2)
    with pytest.warns(UserWarning, match="expected max_epochs that reach the stage 'retrain'"):
        run.fit(module(JointOptim, Scaled(), update_epochs=1), data())
    assert run.current_epoch == 2


def test_a_reset_on_request_is_refused_too():
    with pytest.raises(ValueError, match="for CrossEntropy, which reinitializes it during training, got Scaled"):
        module(CrossEntropy, Scaled()).reset()


def test_a_second_network_with_equal_initial_values_is_warned_of():
    sentence = "for CoTeaching, whose second network has other initial weights, got Scaled, which keeps embedding; pass"
    with pytest.warns(UserWarning, match=sentence):  # the scale is constant in any network
        made = module(CoTeaching, Scaled(), noise_rate=0.3)
    assert torch.equal(made.network.embedding, made.network2.embedding)


class Note(L.Callback):
    """Note the parameters after each step, and at the end of each epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(self.steps[-1])


def renewing():
    torch.manual_seed(0)
    return Renewing(**SMALL, warmup_epochs=1)


def close(made, expected) -> bool:
    return close_to(dict(made.named_parameters()), expected)


def close_to(weights, expected) -> bool:
    return all(torch.allclose(value, expected[name], atol=1e-6) for name, value in weights.items())


class Evaluated(L.Callback):
    """Note the parameters of each validation."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


class UpTo(WeightAveraging):
    """The mean over the first steps only."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx < self.steps


class TestAveragesStartAgainWithTheNetwork:
    """The reset is before step 4 of 12."""

    def test_the_mean_over_the_steps(self):
        made, note = renewing(), Note()
        trainer(3, callbacks=[note, WeightAveraging()]).fit(made, data())
        assert close(
            made, {name: torch.stack([step[name] for step in note.steps[4:]]).mean(0) for name in note.steps[0]}
        )

    def test_the_moving_average(self):
        made, note = renewing(), Note()
        trainer(3, callbacks=[note, EMAWeightAveraging(decay=0.8)]).fit(made, data())
        average = note.steps[4]
        for step in note.steps[5:]:
            average = {name: 0.8 * value + 0.2 * step[name] for name, value in average.items()}
        assert close(made, average)

    def test_the_mean_over_the_epochs(self):
        made, note = renewing(), Note()
        trainer(4, callbacks=[note, StochasticWeightAveraging(0.01, swa_epoch_start=1)]).fit(made, data())
        kept = note.epochs[1:3]  # this callback leaves out the last epoch
        assert close(made, {name: torch.stack([epoch[name] for epoch in kept]).mean(0) for name in kept[0]})

    def test_without_an_update_since_the_reset_the_network_itself_is_evaluated_saved_and_kept(self, tmp_path):
        made, note, evaluated = renewing(), Note(), Evaluated()
        trainer(2, callbacks=[UpTo(4), note, evaluated, AtStep(8, tmp_path / "a.ckpt")]).fit(made, data())
        mean = {name: torch.stack([step[name] for step in note.steps[:4]]).mean(0) for name in note.steps[0]}
        assert close_to(evaluated.weights[0], mean)
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        for weights in (evaluated.weights[1], {name: saved[name] for name in mean}, dict(made.named_parameters())):
            assert close_to(weights, note.steps[7])

    @pytest.mark.parametrize("step", [4, 6])
    def test_a_resumed_run_ends_with_the_same_average(self, step, tmp_path):
        whole, resumed, path = renewing(), renewing(), str(tmp_path / "middle.ckpt")
        trainer(3, callbacks=[EMAWeightAveraging(decay=0.8), AtStep(step, path)]).fit(whole, data())
        trainer(3, callbacks=[EMAWeightAveraging(decay=0.8)]).fit(resumed, data(), ckpt_path=path)
        assert same(whole.network, resumed.network)
