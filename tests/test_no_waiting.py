"""No training step waits for the device.

Where there is no GPU, the step runs on tensors that only say they are on one (``FakeTensorMode``: shapes and devices, no
numbers). Whoever asks such a tensor for a number, or for as many elements as a condition is true for, gets an exception; a copy
to the CPU is looked for here. Left to the last test, which needs a GPU: SSR, whose step draws on the CPU in between, and the
backward passes.
"""

import contextlib
import importlib
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sanm_lightning import SANM, methods
from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import FiniteLoss, Unaveraged
from sanm_lightning.functional import Mixed
from sanm_lightning.methods.nested import NestedDropout
from sanm_lightning.models import SmallCNN
from sanm_lightning.per_sample import SampleState
from sanm_lightning.sanm.quality import LabelQuality
from sanm_lightning.sanm.saliency import grad_cam
from scripts.gpu.cases import TINY, cases
from scripts.gpu.correctness import no_synchronization
from tests.methods.test_every_method import METHODS

N, B, C = 64, 8, 4
SMALL = {
    "network": "small_cnn",
    "network_args": {"width": 4},
    "num_classes": C,
    "image_size": (16, 16),
    "warmup_epochs": 0,
}
IN_EVERY_VARIANT = ("CrossEntropy", "CoTeaching", "CDR", "ELR", "ELRPlus", "GCE", "SSR", "DivideMix")
META = ("MLNT", "IEG", "MetaCleaner")
SANMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "place": "energy",
        "ratio": "affine",
        "regions": "peak_and_trough",
        "anchor": "corner",
        "area": 0.5,
        "spread": "others",
        "fill": "channel",
    },
    "random": {"place": "random", "ratio": "random", "evidence": "margin", "history": 0.5},
    "two levels, unmasked too": {"ratio": "two_level", "keep_unmasked": True, "batch_statistics": False},
}


class NoCopyBack(TorchDispatchMode):
    """Refuse what waits and has a known shape: a copy to the CPU, and a condition as an index."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cuda"]
        assert not (given and isinstance(out, torch.Tensor) and out.device.type == "cpu"), f"{func} copies to the CPU"
        arrived = isinstance(out, torch.Tensor) and out.device.type == "cuda"
        if arrived and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            blocking = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            assert source.device.type != "cpu" or not blocking, f"{func} waits for a copy from the CPU"
        if "index" in str(func):
            indices = [part for arg in args if isinstance(arg, list) for part in arg if isinstance(part, torch.Tensor)]
            assert all(part.dtype != torch.bool for part in indices), f"{func} counts a condition"
            assert not given or all(part.device.type != "cpu" for part in indices), f"{func} waits for an index"
        return out


@pytest.fixture
def on_gpu(monkeypatch):
    """Move a module to the GPU that is not there, and keep away what needs a real one."""
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())

    def move(module: nn.Module) -> None:
        for part in module.modules():
            for name, value in list(part._parameters.items()):
                if value is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(value.shape, device="cuda"), value.requires_grad)
            for name, value in list(part._buffers.items()):
                if value is not None:
                    part._buffers[name] = torch.empty(value.shape, device="cuda", dtype=value.dtype)
            if isinstance(part, Unaveraged):
                part.map_state(lambda value: torch.empty(value.shape, device="cuda", dtype=value.dtype))
            names = part._states if isinstance(part, SampleState) else ()
            for name in (*names, *(["quality"] if isinstance(part, LabelQuality) else [])):
                table = getattr(part, name)
                setattr(part, name, torch.empty(table.shape, dtype=table.dtype, device="cuda"))
            for name in names:
                part._written[name] = torch.empty(N, device="cuda")

    def without_generators(*_: Any, **__: Any) -> None:
        return None

    for name in ("sanm.module", "methods.learned"):
        monkeypatch.setattr(importlib.import_module(f"sanm_lightning.{name}"), "named_generator", without_generators)
    return move


def ready(name: str, monkeypatch: Any, sanm: SANM | None = None, **options: Any) -> Any:
    """Build a method that believes to be in the second epoch of a fit."""
    torch.manual_seed(0)
    module = getattr(methods, name)(**{**SMALL, **METHODS[name], "warmup_epochs": 1, **options}, sanm=sanm)
    trainer = types.SimpleNamespace(current_epoch=1, global_step=9, num_training_batches=8, world_size=1, global_rank=0)
    trainer.fit_loop, trainer.datamodule = types.SimpleNamespace(batch_idx=0), None
    monkeypatch.setattr(type(module), "_trainer", trainer, raising=False)
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "current_epoch", 1)
    monkeypatch.setattr(type(module), "global_step", 9)
    for part in module.modules():
        if isinstance(part, LabelQuality):
            part.reset(N)
        if isinstance(part, SampleState):
            part.reset(N, torch.zeros(N, dtype=torch.int64))
    return module


def mixed_without_draws(images, targets, generator, alpha, larger_half=True):
    """Stand in for mixup, whose draws are made and read on the CPU."""
    mixed = Mixed(images, targets, 0.7, torch.arange(len(images), device=images.device).flip(0))
    return mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


def batch(views: int = 2) -> NoisyBatch:
    labels = torch.zeros(B, dtype=torch.int64, device="cuda")
    images = torch.rand(B, 3, 16, 16, device="cuda")
    return NoisyBatch(images, labels, torch.arange(B, device="cuda"), labels, (images,) * views)


def step(module: Any, move: Any, run: Any) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopyBack():
        move(module)
        loss = run()
        assert loss.device.type == "cuda"
        assert loss.ndim == 0
        return loss


@pytest.mark.parametrize("options", SANMS.values(), ids=SANMS)
@pytest.mark.parametrize("name", [name for name in IN_EVERY_VARIANT if name != "DivideMix"])
def test_a_step_asks_the_device_nothing(name, options, on_gpu, monkeypatch):
    sanm = SANM(seed=0, **options)
    module = ready(name, monkeypatch, sanm)
    for mixing in ("elr_plus", "ssr"):
        monkeypatch.setattr(importlib.import_module(f"sanm_lightning.methods.{mixing}"), "mixup", mixed_without_draws)
    loss = step(module, on_gpu, lambda: module.training_step(batch(), 0))
    assert loss.requires_grad
    assert "quality" in sanm.last


@pytest.mark.parametrize("name", [name for name in METHODS if name not in (*IN_EVERY_VARIANT, *META, "C2D")])
def test_a_step_of_another_method_asks_the_device_nothing(name, on_gpu, monkeypatch):
    options = {"similarity_clip": None} if name == "SelCL" else {}  # the clip is a backward pass
    module = ready(name, monkeypatch, SANM(seed=0), **options)
    monkeypatch.setattr(NestedDropout, "draw", lambda self, generator: None)  # draws on the CPU
    if name.startswith("Nested"):  # Grad-CAM is a backward pass
        monkeypatch.setattr(torch.autograd, "grad", lambda logit, features: (torch.zeros_like(features),))
    for mixing in ("mixup", "m_correction", "fine_tuned", "reed"):
        monkeypatch.setattr(importlib.import_module(f"sanm_lightning.methods.{mixing}"), "mixup", mixed_without_draws)
    monkeypatch.setattr(
        "sanm_lightning.methods.rrl.mixup_among", lambda *rows, among, **draws: mixed_without_draws(*rows, **draws)
    )
    step(module, on_gpu, lambda: module.training_step(batch(3 if name == "MOIT" else 2), 0))


class Normed(SmallCNN):
    """A network whose map is that of a gradient: its head is no linear map of the average."""

    def forward_head(self, features, pre_logits=False):
        return self.fc(nn.functional.layer_norm(features.mean((2, 3)), (self.num_features,)))


def test_a_step_with_the_gradient_of_the_head_asks_the_device_nothing_beside_the_backward_pass(on_gpu, monkeypatch):
    module = ready("CrossEntropy", monkeypatch, SANM(seed=0), network=Normed(C, width=4), network_args=None)
    assert module.sanm.maps.chosen is grad_cam
    asked = []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda logit, features: (asked.append(logit) or torch.zeros_like(features),)
    )
    step(module, on_gpu, lambda: module.training_step(batch(), 0))
    assert len(asked) == 1


@pytest.mark.parametrize("name", META)
def test_a_step_of_meta_learning_asks_the_device_nothing_beside_its_backward_passes(name, on_gpu, monkeypatch):
    module, asked = ready(name, monkeypatch, SANM(seed=0)), []
    module.trainer.optimizers = []

    def zeros(loss, parameters, **_):
        asked.append(loss)
        return tuple(map(torch.zeros_like, parameters))

    monkeypatch.setattr(torch.autograd, "grad", zeros)
    monkeypatch.setattr(  # a forward pass without gradient, in forward mode
        importlib.import_module("sanm_lightning.functional.reweighting"), "directional_derivative",
        lambda network, parameters, direction, images: (network(images).detach(),) * 2,
    )  # fmt: skip
    loss = step(module, on_gpu, lambda: module.training_step(batch(), 0))
    assert loss.requires_grad
    assert len(asked) == {"MLNT": 2, "IEG": 2, "MetaCleaner": 0}[name]


@pytest.mark.parametrize("sanm_views", ["all", "first"])
@pytest.mark.parametrize("options", SANMS.values(), ids=SANMS)
def test_a_step_of_dividemix_asks_the_device_nothing(options, sanm_views, on_gpu, monkeypatch):
    module = ready("DivideMix", monkeypatch, SANM(seed=0, **options), sanm_views=sanm_views)
    monkeypatch.setattr(importlib.import_module("sanm_lightning.methods.dividemix"), "mixup", mixed_without_draws)

    assert step(module, on_gpu, lambda: module.training_step(batch(), 0)).requires_grad


def test_the_gradient_of_cdr_asks_the_device_nothing(on_gpu, monkeypatch):
    module = ready("CDR", monkeypatch)

    def run():
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        module.on_before_optimizer_step(None)
        return module.network.get_classifier().weight.grad.sum()

    step(module, on_gpu, run)


def test_a_loss_that_is_not_finite_is_noted_without_asking(on_gpu, monkeypatch):
    module = ready("CrossEntropy", monkeypatch)

    def run():
        loss = torch.zeros((), device="cuda")
        FiniteLoss().on_before_backward(module.trainer, module, loss)
        return loss

    step(module, on_gpu, run)


@pytest.mark.parametrize("ask", [bool, float, lambda loss: loss.tolist(), lambda loss: loss[None].nonzero()])
def test_whoever_asks_is_found(ask, on_gpu, monkeypatch):
    module = ready("CrossEntropy", monkeypatch)

    def run():
        loss = torch.zeros((), device="cuda")
        ask(loss)
        return loss

    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        step(module, on_gpu, run)


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1)[x > 0].sum(),
        lambda x: torch.zeros(3).to("cuda"),
        lambda x: x.copy_(torch.zeros(3)),
    ],
)
def test_whoever_copies_or_counts_is_found(ask, on_gpu, monkeypatch):
    module = ready("CrossEntropy", monkeypatch)

    def run():
        ask(torch.zeros(3, device="cuda"))
        return torch.zeros((), device="cuda")

    with pytest.raises((AssertionError, DynamicOutputShapeException)):
        step(module, on_gpu, run)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.label)
def test_no_step_of_a_real_fit_waits(case):
    assert no_synchronization(case, TINY)["passed"]
