"""What holds for every method, alone and under SANM."""

import contextlib
import functools
import pickle
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

import sanm_lightning
from sanm_lightning import SANM, methods
from sanm_lightning.methods import NoisyLabelModule
from tests.full import FULL
from tests.methods.toy import data, same, trainer

SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": 4, "image_size": (16, 16)}
CONTRAST = {
    "k": 5, "projection": 8, "memory_per_class": 6, "memory_after": 1, "select_epochs": 1, "bootstrap_after": 0, "view": "weak",
}  # fmt: skip
OPTIONS = {  # what a method needs beside warmup_epochs: 1; the others are found in the package
    "CoTeaching": {"noise_rate": 0.5, "num_gradual": 2},
    "CDR": {"noise_rate": 0.5},
    "DivideMix": {"ramp_epochs": 1.0},
    "C2D": {"ramp_epochs": 1.0, "pretrained": "FILE"},
    "SSR": {"warmup_epochs": 0, "k": 5},
    "CoTeachingPlus": {"noise_rate": 0.5, "num_gradual": 2},
    "SELFIE": {"noise_rate": 0.5, "history": 2, "uncertainty": 0.5},
    "INCV": {"rounds": 1},
    "NestedCoTeaching": {"noise_rate": 0.5},
    "REED": {"ramp_epochs": 1.0, "pretrained": "FILE"},
    "RRL": {"k": 5, "given_epochs": 0, "projection": 8, "high_threshold": 0.3, "view": "weak"},
    "MOIT": CONTRAST,
    "SelCL": {**CONTRAST, "negatives": 40, "similarity_clip": 0.25},
    "IEG": {"probe": str(Path(__file__).with_name("probe.csv"))},  # samples 0 to 3
    "MLNT": {"num_lookaheads": 2, "neighbors": 3, "ramp_steps": 2},
    "MetaCleaner": {"set_size": 4},
}
BASES = ("NoisyLabelModule", "TwoNetworks", "SimCLR")
METHODS = {
    name: {"warmup_epochs": 1, **OPTIONS.get(name, {})}
    for name, found in sorted(vars(methods).items())
    if isinstance(found, type) and issubclass(found, NoisyLabelModule) and name not in BASES
}
STEPS = (6, 8) if FULL else (6,)  # in the middle and at the end of an epoch
SANMS = {**({"alone": None} if FULL else {}), "sanm": {"mu": 0.5, "beta": 0.02, "seed": 0}}


def test_the_package_exports_every_method():
    for name in (*METHODS, "SimCLR", "NoisyLabelModule"):
        assert name in sanm_lightning.__all__
        assert getattr(sanm_lightning, name) is getattr(methods, name)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A pre-trained encoder, as C2D wants one."""
    torch.manual_seed(5)
    module = methods.CrossEntropy(**SMALL)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    torch.save({"state_dict": module.state_dict()}, path)
    return str(path)


class Case:
    """Fresh, equal modules of one method, and one uninterrupted run for all tests that compare with it."""

    def __init__(self, name: str, sanm: str, encoder: str, folder: Path) -> None:
        self.name, self.options, self.encoder, self.folder = name, SANMS[sanm], encoder, folder
        self.under_sanm = self.options is not None

    def __call__(self, **options) -> NoisyLabelModule:
        torch.manual_seed(0)
        arguments = {**SMALL, **METHODS[self.name], **options}
        if "pretrained" in arguments:
            arguments["pretrained"] = self.encoder
        if self.under_sanm and "sanm" not in options:
            arguments["sanm"] = SANM(**self.options)
        return getattr(methods, self.name)(**arguments)

    @functools.cached_property
    def whole(self) -> NoisyLabelModule:
        """A module after three epochs, with checkpoints of some steps and of the end."""
        module = self()
        run = fit(module, callbacks=[AtStep(step, self.checkpoint(step)) for step in STEPS])
        run.save_checkpoint(self.checkpoint("end"))
        return module

    def checkpoint(self, step: int | str) -> Path:
        return self.folder / f"{step}.ckpt"


@pytest.fixture(scope="module", params=[(name, sanm) for name in METHODS for sanm in SANMS], ids="-".join)
def make(request, encoder, tmp_path_factory):
    """Return a factory of fresh, equal modules of one method."""
    return Case(*request.param, encoder, tmp_path_factory.mktemp("runs"))


@contextlib.contextmanager
def empty_sets_allowed():
    """On 64 samples a set may well be empty in some epoch, and a short run has no last stage; the methods say so and go on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*empty.*")
        warnings.filterwarnings("ignore", message=".*that reach the stage 'finetune'")
        warnings.filterwarnings("ignore", message=".*samples for the neighbors of")
        yield


def fit(module, source=None, epochs=3, ckpt_path=None, **options):
    run = trainer(epochs, **options)
    with empty_sets_allowed():
        run.fit(module, data() if source is None else source, ckpt_path=ckpt_path)
    return run


def watch(module):
    """Note the views of every SANM of a module."""
    seen = []
    for sanm in (part for part in module.modules() if isinstance(part, SANM)):
        forward = sanm.forward

        def watched(*args, forward=forward, **options):
            seen.append(forward(*args, **options))
            return seen[-1]

        sanm.forward = watched
    return seen


def networks(module):
    return module.networks


def test_every_method_is_found():
    assert set(METHODS) >= {"C2D", "CDR", "ELR", "GCE", "SSR", "CoTeaching", "CrossEntropy", "DivideMix", "ELRPlus"}
    assert set(OPTIONS) <= set(METHODS)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("name", METHODS if FULL else ("MetaCleaner", "SelCL"))
def test_it_trains_with_weights_of_another_precision(name, precision, encoder):
    torch.manual_seed(0)
    options = {**METHODS[name], **({"pretrained": encoder} if "pretrained" in METHODS[name] else {})}
    module = getattr(methods, name)(**SMALL, **options, sanm=SANM(**SANMS["sanm"]))
    run = fit(module, data(num_samples=32, num_test_samples=8), precision=precision)
    assert run.callback_metrics["train/loss"].isfinite()
    assert module.network.get_classifier().weight.isfinite().all()


@pytest.mark.parametrize("precision", ["bf16-mixed", *(["32-true"] if FULL else [])])
def test_it_learns_in_every_part_and_masks_after_the_warm_up(make, precision):
    module = make()
    before = {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}
    seen = watch(module)
    run = fit(module, precision=precision)
    assert run.global_step == 3 * 4
    changed = {
        name
        for name, value in module.named_parameters()
        if value.requires_grad and not torch.equal(before[name], value)
    }
    assert changed == set(before), "some part never learned"
    assert all(
        bool(torch.isfinite(value).all()) for value in module.state_dict().values() if isinstance(value, torch.Tensor)
    )
    assert 0 <= run.callback_metrics["test/acc"] <= 1
    if make.under_sanm:
        drawn = [views for views in seen if views.box is not None]
        assert drawn, "no mask was drawn"
        assert any(bool((views.ratio > 0.01).any()) for views in drawn)
        assert any(not torch.equal(views.targets, views.targets.round()) for views in drawn)
    else:
        assert all(views.ratio is None for views in seen)


class AtStep(L.Callback):
    """Save in the middle of an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", STEPS)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(make, step):
    whole, resumed = make.whole, make()
    torch.load(make.checkpoint(step), weights_only=True)
    torch.manual_seed(77)
    fit(resumed, ckpt_path=make.checkpoint(step))
    for one, other in zip(networks(whole), networks(resumed), strict=True):
        assert same(one, other)
    mine, again = whole.state_dict(), resumed.state_dict()
    assert mine.keys() == again.keys()
    torch.testing.assert_close(
        {key: mine[key] for key in mine}, {key: again[key] for key in mine}, rtol=0, atol=0, equal_nan=True
    )


def test_it_can_be_pickled(make):
    whole = make()
    copied = pickle.loads(pickle.dumps(whole))
    assert type(copied) is type(whole) and all(
        same(one, other) for one, other in zip(networks(whole), networks(copied), strict=True)
    )


def test_it_never_reads_true_labels(make):
    class Garbage(type(data())):
        def _labels(self, split, index):
            labels, _ = super()._labels(split, index)
            return labels, torch.full_like(labels, 10**6)

    blind, source = make(), data()
    source.__class__ = Garbage
    fit(blind, source)
    for one, other in zip(networks(make.whole), networks(blind), strict=True):
        assert same(one, other)


def test_accumulation_and_clipping_are_honoured(make):
    module = make()
    norms = []

    class Measure(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            for network in networks(pl_module):
                gradients = [p.grad.norm() for p in network.parameters() if p.grad is not None]
                if gradients:
                    norms.append(float(torch.stack(gradients).norm()))

    run = fit(module, epochs=2, accumulate_grad_batches=2, gradient_clip_val=1e-3, callbacks=[Measure()])
    assert run.global_step == 2 * 2
    assert norms
    if not getattr(module, "warmup_clip", None):
        assert max(norms) <= 1e-3 * 1.001


@pytest.mark.parametrize("make", [(name, "sanm") for name in METHODS], ids="-".join, indirect=True)
def test_with_mu_and_beta_zero_it_is_the_plain_method(make):
    plain, idle = make(sanm=None), make(sanm=SANM(mu=0.0, beta=0.0, seed=torch.initial_seed()))
    plain.sanm.seed = idle.sanm.seed
    fit(plain, epochs=2)
    fit(idle, epochs=2)
    for one, other in zip(networks(plain), networks(idle), strict=True):
        assert same(one, other)


def test_a_checkpoint_loads_by_itself(make):
    module = make.whole
    loaded = type(module).load_from_checkpoint(make.checkpoint("end"), map_location="cpu", weights_only=True)
    images = torch.rand(3, 3, 16, 16)
    module.eval(), loaded.eval()
    assert torch.equal(module(images), loaded(images))


class Steps(L.Callback):
    """Count the steps that were begun."""

    begun = 0

    def on_train_batch_start(self, *_):
        self.begun += 1


@pytest.mark.parametrize(("samples", "batch_size"), [(5, 1), (9, 8), (1, 8), (2, 8)] if FULL else [(5, 1), (1, 8)])
def test_tiny_sets_and_batches_of_one_are_learned_from_or_refused_before_training(make, samples, batch_size):
    name = type(make()).__name__
    module, count = make(**({"k": 1} if name == "SSR" else {})), Steps()
    refused = {
        "SSR": min(samples, batch_size) == 1, "IEG": samples < 4, **dict.fromkeys(("DivideMix", "C2D", "REED"), samples == 1),
    }.get(name, False)  # fmt: skip
    sentences = {
        "SSR": "at least 2 samples per step",
        "IEG": f"expected one row for some of the {samples} training samples .* of unknown samples",
    }
    sentence = sentences.get(name, "expected 2 or more training samples")
    with pytest.raises(ValueError, match=sentence) if refused else contextlib.nullcontext():
        fit(module, data(num_samples=samples, batch_size=batch_size), epochs=2, callbacks=[count])
    assert bool(count.begun) is not refused
    assert all(bool(torch.isfinite(value).all()) for value in module.parameters())
