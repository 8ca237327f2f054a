"""Steps of every method on fixed weights, batches and draws, for ``test_recording.py``.

Nothing here depends on how streams are named or views are made: parameters are functions of their names, images and views of
their numbers, and the draws of masks and mixup of the number of the call.
"""

import contextlib
import hashlib
import importlib
import types
from typing import Any

import torch
from torch import Tensor

from sanm_lightning import SANM, NoisyBatch, methods

N, C, B, HALF = 32, 4, 8, 4
SMALL = {"network": "small_cnn", "network_args": {"width": 4}, "num_classes": C, "image_size": (16, 16)}
RATE = {"CoTeaching": "noise_rate", "CDR": "noise_rate"}
TOGETHER = {"guess_together": True}
"""The recorded code guesses both halves in one pass."""
CASES: dict[str, dict[str, Any]] = {
    "CrossEntropy": {}, "CDR": {"rate": 0.4}, "CoTeaching": {"rate": 0.4, "num_gradual": 1}, "ELR": {}, "ELRPlus": {},
    "ELRPlus product": {"target_product": True, "coef_steps": 10}, "CoTeaching scaled": {"rate": 0.4, "released_scale": True},
    "DivideMix": TOGETHER, "DivideMix more views": {"train_views": ["weak", "weak", "weak"], **TOGETHER},
    "DivideMix first": {"train_views": ["weak", "weak"], "sanm_views": "first", **TOGETHER},
    "DivideMix guess": {"unlabelled_quality": "guess", "confidence_penalty": True, **TOGETHER},
    "DivideMix by turns": {"alternate": True, **TOGETHER}, "C2D": TOGETHER,
    "SSR": {"k": 5}, "SSR without consistency": {"k": 5, "lambda_fc": 0.0}, "SSR warm": {"k": 5, "warmup_epochs": 1},
    "SimCLR": {}, "SimCLR scaled": {"released_scale": True},
}  # fmt: skip
SANMS: dict[str, dict[str, Any] | None] = {
    "alone": None, "sanm": {}, "unmasked too": {"keep_unmasked": True}, "energy, two boxes": {
        "place": "energy", "regions": "peak_and_trough", "anchor": "corner", "spread": "others", "area": 0.5,
    }, "oracle": {"quality": "oracle"}, "masks only": {"labels": False, "reconstruct": False},
    "labels only": {"mask": False, "reconstruct": False}, "running statistics": {"batch_statistics": False},
    "affine": {"ratio": "affine", "fill": "channel", "mu": 0.1},
}  # fmt: skip


def seeded(*words: Any) -> torch.Generator:
    digest = hashlib.blake2b(repr(words).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


IMAGES = torch.rand(N, 3, 16, 16, generator=seeded("images"))
LABELS = torch.arange(N) % C
TRUE = torch.where(torch.rand(N, generator=seeded("wrong")) < 0.5, (LABELS + 1) % C, LABELS)
QUALITY = torch.rand(2, N, generator=seeded("quality"))


def view(number: int, index: Tensor) -> Tensor:
    noise = torch.rand(N, 3, 16, 16, generator=seeded("view", number))
    return (0.7 * IMAGES + 0.3 * noise)[index]


def fill(module: torch.nn.Module) -> None:
    """Make every parameter a function of its name."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            name = name.replace(".module.", ".")
            drawn = torch.randn(parameter.shape, generator=seeded("parameter", name))
            norm = parameter.ndim == 1 and name.endswith("weight")
            scale = 0.3 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(1 + 0.1 * drawn if norm else 2 * scale * drawn)


def mixup(images: Tensor, targets: Tensor, generator: Any, alpha: float, larger_half: bool = True) -> Any:
    """Mix as asked, by draws that follow from the number of rows."""
    kind = importlib.import_module(MIXED).Mixed
    mixed = kind(images, targets, 0.7, torch.randperm(len(images), generator=seeded("mix", len(images))))
    return mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


MIXED = "sanm_lightning.functional"


class Data:
    """What a pass over the training set needs."""

    num_samples, batch_size, eval_batch_size = N, B, 10
    labels = LABELS

    def pass_dataloader(self, split: str = "train") -> list[Tensor]:
        return list(torch.arange(N).split(self.eval_batch_size))

    def pass_batch(self, index: Tensor, split: str, *_: Any, **__: Any) -> NoisyBatch:
        return NoisyBatch(IMAGES[index], LABELS[index], index, TRUE[index])

    def split_size(self, split: str) -> int:
        return N

    def pass_pool(self) -> Tensor:
        return torch.arange(N)


def trainer(epoch: int) -> Any:
    same = types.SimpleNamespace(reduce=lambda tensor, reduce_op=None: tensor)
    return types.SimpleNamespace(
        current_epoch=epoch, global_step=5 * epoch, num_training_batches=4, world_size=1, global_rank=0, strategy=same,
        datamodule=Data(), fit_loop=types.SimpleNamespace(batch_idx=1), callbacks=[],
        precision_plugin=types.SimpleNamespace(forward_context=contextlib.nullcontext, convert_input=lambda batch: batch),
    )  # fmt: skip


def build(name: str, sanm: dict[str, Any] | None) -> Any:
    kind, options = name.split()[0], dict(CASES[name])
    if "rate" in options:
        options[RATE[kind]] = options.pop("rate")
    options = {"warmup_epochs": 0 if kind == "SSR" else 1, **options}
    given = None if sanm is None else SANM(**{"mu": 0.4, "seed": 0, **sanm})
    torch.manual_seed(0)
    module = getattr(methods, kind)(**SMALL, **options, sanm=given)
    fill(module)
    return module


def figures(module: Any, loss: Tensor) -> dict[str, Any]:
    """The loss, and a norm and a projection of every gradient and buffer."""
    module.zero_grad()
    loss.backward()
    seen: dict[str, Any] = {"loss": float(loss.detach())}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            direction = torch.randn(parameter.shape, generator=seeded("direction", name))
            seen[name] = [float(parameter.grad.norm()), float((parameter.grad * direction).sum())]
    for name, buffer in module.named_buffers():
        if "running" in name and "teachers" not in name:
            seen[name] = float(buffer.double().sum())
    return seen


def numbers(tensor: Tensor) -> list[float]:
    """A tensor in brief: its sum, and a projection."""
    values = tensor.detach().double().flatten()
    return [float(values.sum()), float((values * torch.randn(len(values), generator=seeded("n")).double()).sum())]


def index_of(name: str, network: int) -> Tensor:
    return torch.randperm(N, generator=seeded("rows", name.split()[0], network))[: 2 * HALF]


# How the present code is asked


def divided(module: Any) -> Any:
    module.division.reset(N)
    module.division.clean = QUALITY.T.clone()
    return module


def selected(module: Any) -> Any:
    module.selection.reset(N, LABELS)
    module.selection.update(labels=TRUE, quality=QUALITY[0], given_quality=QUALITY[1])
    return module


def prepare(module: Any) -> None:
    for number, sanm in enumerate(module.sanms):
        sanm.label_quality.reset(N)
        sanm.label_quality.quality = QUALITY[number].clone()
    for bank in [*getattr(module, "banks", []), *([module.targets] if hasattr(module, "targets") else [])]:
        bank.reset(N)
        bank.value = torch.rand(N, C, generator=seeded("bank")).softmax(1)


def batch_of(name: str, module: Any) -> NoisyBatch:
    """The row that the loader would serve, with its views."""
    index, other = index_of(name, 0), index_of(name, 1)
    kind = name.split()[0]
    if kind in ("DivideMix", "C2D") and module.stage.name != "warmup":
        row = torch.cat([index_of(name, number) for number in module.learning()])
        views = tuple(view(number, row) for number in range(len(module.views())))
    elif kind == "SSR" and module.stage.name == "warmup":
        row, views = index, (view(2, index), view(3, index))
    elif kind == "SSR":
        plain = [(view(2 + number, index)) for number in (0, 1)] if module.lambda_fc > 0 else [IMAGES[:0]] * 2
        row = torch.cat([other, index]) if module.lambda_fc > 0 else other
        views = tuple(torch.cat([view(number, other), plain[number]]) for number in (0, 1))
    elif kind == "SimCLR":
        row, views = index, (view(0, index), view(1, index))
    else:
        row, views = index, (view(2, index),)
    return NoisyBatch(views[0], LABELS[row], row, TRUE[row], views)


def step(name: str, sanm: str, epoch: int) -> dict[str, Any]:
    """One training step in an epoch."""
    module = build(name, SANMS[sanm])
    module._trainer = trainer(epoch)
    prepare(module)
    if hasattr(module, "division"):
        divided(module)
    if hasattr(module, "selection"):
        selected(module)
    calls: list[int] = []

    def stream(kind: str, *parts: int, device: Any = "cpu") -> torch.Generator:
        if kind == "mask":
            calls.append(1)
        return torch.Generator().manual_seed(1000 + len(calls))

    module.stream = stream
    seen = figures(module, module.training_step(batch_of(name, module), 1))
    if kept := [*getattr(module, "banks", []), *([module.targets] if hasattr(module, "targets") else [])]:
        seen["targets"] = [numbers(bank.value) for bank in kept]
    if module.sanm.enabled and not module.estimates_quality:
        seen["evidence"] = [numbers(part.label_quality.bank.sum) for part in module.sanms]
    return seen


def beginning(name: str) -> dict[str, Any]:
    """What a method makes of the training set at the beginning of an epoch."""
    module = build(name, None)
    module._trainer = trainer(2)
    if hasattr(module, "division"):
        divided(module).begin_epoch()
        return {"clean": [numbers(part) for part in module.division.clean.T]}
    selected(module).begin_epoch()
    found = module.selection
    return {
        "labels": found.labels.tolist(), "selected": found.selected.long().tolist(), "quality": numbers(found.quality),
        "given": numbers(found.given_quality),
    }  # fmt: skip


def everything(full: bool = True) -> dict[str, Any]:
    """All cases, by name; without ``full``, each method alone and under SANM as it is."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for mixing in ("dividemix", "elr_plus", "ssr"):
            room = importlib.import_module(f"sanm_lightning.methods.{mixing}")
            stack.callback(setattr, room, "mixup", room.mixup)
            room.mixup = mixup  # type: ignore[attr-defined]
        for name in CASES:
            for sanm in (SANMS if full else ("alone", "sanm")) if not name.startswith("SimCLR") else ("alone",):
                if " " in name and sanm not in ("alone", "sanm", "energy, two boxes"):
                    continue
                for epoch in (0, 2):
                    found[f"{name} | {sanm} | {epoch}"] = step(name, sanm, epoch)
        for name in ("DivideMix", "C2D", "SSR"):
            found[f"{name} | beginning"] = beginning(name)
    return found
