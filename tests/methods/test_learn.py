"""What ``learn`` promises every method: what the decoder sees, what is logged, whose estimate of label quality counts."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from timm.optim import Lookahead
from torch import nn

from sanm_lightning import SANM, methods
from sanm_lightning.methods.ema import EMA
from sanm_lightning.sanm import LabelQuality, QualityEstimator, QualityFile
from tests.full import FULL
from tests.methods.test_every_method import METHODS, SMALL, empty_sets_allowed, encoder, fit  # noqa: F401
from tests.methods.toy import data, same, trainer

TWO = [name for name in METHODS if getattr(methods, name).num_networks == 2]
JUDGING = [name for name in METHODS if getattr(methods, name).estimates_quality]


@pytest.fixture
def make(encoder):  # noqa: F811
    def build(name, sanm, **options):
        torch.manual_seed(0)
        arguments = {**SMALL, **METHODS[name], **options}
        if "pretrained" in arguments:
            arguments["pretrained"] = encoder
        return getattr(methods, name)(**arguments, sanm=sanm)

    return build


def watch_reconstruction(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each reconstruction: the images whose features the decoder got, and the views that SANM had made."""
    seen = []
    for network, sanm in zip(module.networks, module.sanms, strict=True):
        inputs: dict[int, torch.Tensor] = {}
        kept = []
        forward, reconstruct = network.forward_features, sanm.reconstruction

        def features_of(images, forward=forward, inputs=inputs, kept=kept):
            out = forward(images)
            kept.append(out)
            inputs[id(out)] = images
            return out

        def watched(features, images, views=None, reconstruct=reconstruct, inputs=inputs):
            if views.masked:
                seen.append((inputs[id(features)], views.images))
            return reconstruct(features, images, views)

        network.forward_features, sanm.reconstruction = features_of, watched
    return seen


PARTS = {"all": {}, **({"alone": {"mask": False, "labels": False}, "labels": {"mask": False}} if FULL else {})}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", METHODS)
def test_the_decoder_sees_the_unmixed_views(name, parts, make):
    module = make(name, SANM(mu=0.5, seed=0, **parts))
    seen = watch_reconstruction(module)
    fit(module, epochs=2)
    assert seen
    for given, views in seen:
        assert torch.equal(given, views)


class Terms(L.Callback):
    """Note what every SANM did in each step, and the loss."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        figures = [{k: float(v) for k, v in sanm.last.items()} for sanm in pl_module.sanms]
        self.steps.append((trainer.current_epoch, float(outputs["loss"]), figures))


@pytest.mark.parametrize("name", TWO)
def test_logged_figures_are_those_of_both_networks(name, make):
    module, terms = make(name, SANM(mu=0.5, beta=0.7, seed=0)), Terms()
    run = fit(module, epochs=2, callbacks=[terms])
    last = [(loss, figures) for epoch, loss, figures in terms.steps if epoch == 1]
    assert len(last) == 4
    for figure in ("quality", "masked_fraction", "reconstruction_loss"):
        mean = sum(sum(part[figure] for part in figures) / 2 for _, figures in last) / len(last)
        assert float(run.callback_metrics[f"train/{figure}"]) == pytest.approx(mean, rel=1e-4)
    losses = [loss - 0.7 * sum(part["reconstruction_loss"] for part in figures) for loss, figures in last]
    assert float(run.callback_metrics["train/classification_loss"]) == pytest.approx(
        sum(losses) / 4, rel=1e-3, abs=1e-4
    )
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(sum(loss for loss, _ in last) / 4, rel=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_masked_steps_are_those_in_which_something_was_hidden(name, make):
    module, terms = make(name, SANM(mu=0.5, seed=0)), Terms()
    run = fit(module, epochs=3, callbacks=[terms])
    hidden = sum(any(part.get("masked_fraction", 0) > 0 for part in figures) for _, _, figures in terms.steps)
    counted = next(part.masked_steps for part in run.callbacks if hasattr(part, "masked_steps"))
    assert counted == hidden
    assert 0 < counted < len(terms.steps) or name == "SSR"


class Constant(QualityEstimator):
    """The same quality for every label; counts what it is told."""

    def __init__(self, value: float = 0.25) -> None:
        super().__init__()
        self.value, self.updates, self.fits = value, 0, []

    def update(self, logits, targets, index=None, features=None):
        assert logits.shape == targets.shape
        assert not logits.requires_grad or logits.is_leaf is False
        self.updates += 1

    def fit(self, module=None):
        self.fits.append(module)

    def forward(self, logits, targets, index=None):
        return torch.full((len(targets),), self.value)


def test_a_step_with_masks_of_no_area_is_not_a_masked_step(make):
    run = fit(make("CrossEntropy", SANM(mu=0.5, quality=Constant(1.0), seed=0)), epochs=3)
    assert float(run.callback_metrics["train/masked_fraction"]) == 0
    assert next(part.masked_steps for part in run.callbacks if hasattr(part, "masked_steps")) == 0


@pytest.mark.parametrize("name", METHODS)
def test_an_estimator_that_is_handed_in_always_counts(name, make):
    given = Constant(0.25)
    module = make(name, SANM(mu=0.4, quality=given, seed=0))
    seen = []
    for sanm in module.sanms:
        forward = sanm.forward
        sanm.forward = lambda *a, forward=forward, **k: seen.append(forward(*a, **k)) or seen[-1]
    run = fit(module, epochs=2)
    ratios = torch.cat([views.ratio for views in seen if views.masked])
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.4 * 0.75))
    assert float(run.callback_metrics["train/quality"]) == pytest.approx(0.25)
    estimators = [sanm.label_quality for sanm in module.sanms]
    assert len({id(part) for part in [*estimators, given]}) == len(estimators) + 1, "each network has a copy of its own"
    for part in estimators:
        assert part.updates > 0
        assert part.fits == [module] * 3  # before each epoch, and when all is over
    assert given.updates == 0


@pytest.mark.parametrize("name", JUDGING)
def test_without_one_the_estimate_of_the_method_counts_and_no_evidence_is_recorded(name, make):
    module = make(name, SANM(mu=0.4, seed=0))
    fit(module, epochs=2)
    for sanm in module.sanms:
        assert isinstance(sanm.label_quality, LabelQuality)
        assert not bool(sanm.label_quality.bank.epochs.any())


class TestQualityFile:
    def path(self, tmp_path, values):
        path = tmp_path / "quality.csv"
        path.write_text("quality\n" + "\n".join(str(float(value)) for value in values) + "\n")
        return str(path)

    @pytest.mark.parametrize("name", ["CrossEntropy", "DivideMix"])
    def test_gives_each_sample_its_value_from_the_first_epoch_on(self, name, make, tmp_path):
        values = torch.linspace(0, 1, 64)
        sanm = SANM(mu=0.4, quality=QualityFile(self.path(tmp_path, values)), warmup_epochs=0, seed=0)
        module, seen = make(name, sanm), []
        source = module.sanm.source_of_quality
        module.sanm.source_of_quality = lambda targets, index, true: seen.append(index) or source(targets, index, true)
        run = fit(module, epochs=2)
        assert seen
        torch.testing.assert_close(module.sanm.label_quality.values, values)
        quality = module.sanm.label_quality(torch.zeros(3, 4), torch.eye(4)[:3], torch.tensor([5, 0, 63]))
        torch.testing.assert_close(quality, values[torch.tensor([5, 0, 63])])
        assert 0 < float(run.callback_metrics["train/quality"]) < 1

    def test_is_read_when_a_fit_begins_and_a_checkpoint_does_without(self, make, tmp_path):
        path = self.path(tmp_path, [0.5] * 64)
        module = make("CrossEntropy", SANM(quality=QualityFile("no such file.csv"), seed=0))
        with pytest.raises(FileNotFoundError, match=r"expected a file of label quality in 'no such file\.csv'"):
            fit(module)
        module = make("CrossEntropy", SANM(quality=QualityFile(path), seed=0))
        run = fit(module, epochs=2)
        run.save_checkpoint("a.ckpt")
        (tmp_path / "quality.csv").unlink()
        loaded = methods.CrossEntropy.load_from_checkpoint("a.ckpt", weights_only=True)
        assert isinstance(loaded.sanm.label_quality, QualityFile)
        torch.testing.assert_close(loaded.sanm.label_quality.values, torch.full((64,), 0.5))
        again = make("CrossEntropy", SANM(quality=QualityFile(path), seed=0))
        fit(again, epochs=3, ckpt_path="a.ckpt")

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            ("quality\n0.5\n", "expected 64 values in \\[0, 1\\] .* got shape \\(1,\\)"),
            ("quality\n" + "1.5\n" * 64, "expected 64 values in \\[0, 1\\]"),
            ("other\n" + "0.5\n" * 64, "expected label quality under 'quality'"),
        ],
    )
    def test_a_wrong_file_ends_in_a_sentence(self, content, sentence, make, tmp_path):
        (tmp_path / "wrong.csv").write_text(content)
        with pytest.raises(ValueError, match=sentence):
            fit(make("CrossEntropy", SANM(quality=QualityFile(str(tmp_path / "wrong.csv")), seed=0)))


class Louder(SANM):
    """A subclass with an argument of its own."""

    def __init__(self, gain: float = 2.0, **options) -> None:
        super().__init__(**options)
        self.gain, self.options = gain, {**self.options, "gain": gain}
        self.calls = 0

    def forward(self, *args, **options):
        self.calls += 1
        return super().forward(*args, **options)


@pytest.mark.parametrize("name", TWO)
def test_both_networks_of_a_subclass_of_sanm_have_the_subclass_and_a_checkpoint_rebuilds_it(name, make):
    module = make(name, Louder(gain=3.0, mu=0.4, seed=0))
    run = fit(module, epochs=2)
    for sanm in module.sanms:
        assert type(sanm) is Louder
        assert sanm.gain == 3.0
        assert sanm.calls == module.sanm.calls > 0
    run.save_checkpoint("a.ckpt")
    loaded = type(module).load_from_checkpoint("a.ckpt", weights_only=True)
    assert type(loaded.sanm) is type(loaded.sanm2) is Louder
    assert loaded.sanm.gain == 3.0


HOOKS = [
    "setup", "teardown", "prepare_data", "configure_model", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", "on_before_backward",
    "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step", "on_validation_start", "on_validation_end",
    "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
    "on_save_checkpoint", "on_load_checkpoint", "configure_callbacks",
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS if FULL else HOOKS[::3])
@pytest.mark.parametrize("name", ["DivideMix", "ELR"] if FULL else ["DivideMix"])
def test_a_hook_overridden_without_super_loses_nothing(name, hook, make, tmp_path):
    plain = make(name, SANM(mu=0.5, seed=0))
    answer = [] if hook == "configure_callbacks" else None
    quiet = make(name, SANM(mu=0.5, seed=0))
    quiet.__class__ = type(name, (type(plain),), {hook: lambda self, *args, **options: answer})
    again = make(name, SANM(mu=0.5, seed=0))
    again.__class__ = quiet.__class__
    fit(plain, epochs=2)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    run = fit(quiet, epochs=2, callbacks=[Save()])
    assert "train/loss" in run.callback_metrics
    assert "train/quality" in run.callback_metrics
    torch.manual_seed(9)
    fit(again, epochs=2, ckpt_path=tmp_path / "a.ckpt")
    for one, other, resumed in zip(plain.networks, quiet.networks, again.networks, strict=True):
        assert same(one, other)
        assert same(one, resumed)


@pytest.mark.parametrize("name", ["ELRPlus", "IEG", "MLNT", "SelCL"] if FULL else ["SelCL"])
def test_averaged_networks_are_updated_in_a_subclass_with_its_own_optimizer_step(name, make):
    def step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)

    def create(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

    plain, own = make(name, None), make(name, None)
    own.__class__ = type(name, (type(plain),), {"optimizer_step": step, "configure_optimizers": create})
    for module in (plain, own):
        fit(module, epochs=3)
    averages = [[part for part in module.modules() if isinstance(part, EMA)] for module in (plain, own)]
    for one, other in zip(*averages, strict=True):
        assert same(one.module, other.module)
        assert one.steps == other.steps > 0


class Twice(torch.optim.SGD):
    """Calls the step of its base class, whose hooks are its own."""

    def step(self, closure=None):
        return super().step(closure)


def averaged(make, kind, epochs=2, **options):
    """Fit SelCL with an optimizer of another class; return the module and the number of updates of its average."""
    module = make("SelCL", None)
    create = {"configure_optimizers": lambda self: kind(self.parameters(), lr=0.02)}
    module.__class__ = type("SelCL", (type(module),), create)
    fit(module, epochs=epochs, **options)
    return module, module.key_network.steps


def test_averaged_networks_are_updated_once_per_step_of_an_optimizer_that_calls_its_base_class(make):
    (plain, updates), (twice, other) = averaged(make, torch.optim.SGD), averaged(make, Twice)
    assert updates == other == 2 * 4
    assert same(plain.key_network.module, twice.key_network.module)


def test_averaged_networks_are_updated_once_per_accumulated_step(make):
    assert averaged(make, torch.optim.SGD, accumulate_grad_batches=2)[1] == 2 * 2


def test_averaged_networks_are_not_updated_in_a_step_that_gradient_scaling_skips(make):
    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.total_batch_idx == 1:
                next(pl_module.network.parameters()).grad.fill_(float("inf"))

    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    assert averaged(make, torch.optim.SGD, plugins=[scaled], callbacks=[Overflow()])[1] == 2 * 4 - 1


def test_an_optimizer_without_hooks_is_refused_by_methods_that_need_them(make):
    def create(parameters, lr):
        return Lookahead(torch.optim.SGD(parameters, lr=lr))

    with pytest.raises(
        ValueError, match="expected an optimizer that calls the hooks of its steps, got Lookahead, which"
    ):
        averaged(make, create)
    module = make("CrossEntropy", None)
    module.__class__ = type(
        "CrossEntropy", (type(module),), {"configure_optimizers": lambda self: create(self.parameters(), 0.02)}
    )
    fit(module, epochs=1)


def test_a_loss_that_is_not_finite_is_still_seen_by_a_module_with_hooks_of_its_own():
    class Quiet(methods.CrossEntropy):
        def on_before_backward(self, loss):
            pass

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

        def on_train_epoch_end(self):
            pass

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(ValueError, match="got NaN or infinity from Quiet, first at step 1"):
        trainer(1).fit(Quiet(**SMALL), data())
