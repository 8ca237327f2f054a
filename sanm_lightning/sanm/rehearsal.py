"""Run the training step of a third-party module on a copy, to detect steps that use labels as class indices."""

import contextlib
import copy
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from sanm_lightning.sanm.feature_extractor import FeatureExtractor
from sanm_lightning.sanm.foreign_batch import images_and_labels, rebuilt

__all__ = ["misread_labels", "own_streams"]


@contextlib.contextmanager
def own_streams() -> Iterator[None]:
    """Context manager that restores all global random streams at exit."""
    streams = isolate_rng()
    streams.__enter__()
    try:
        yield
    finally:  # missing in isolate_rng
        streams.__exit__(None, None, None)


class _QuietTrainer:
    """Proxy of a trainer for a rehearsal: reads are forwarded, writes and logger calls are discarded."""

    def __init__(self, trainer: Any) -> None:
        self._real = trainer
        self.logger = DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def misread_labels(
    pl_module: L.LightningModule, tap: FeatureExtractor, step: Any, batch: Any, args: Any, kwargs: Any
) -> str | None:
    """Describe the difference of a training step with one-hot rows instead of class indices; None if there is none.

    The step runs on copies of the module, with the predicted labels (so that no accuracy is zero by chance) and a batch
    size that is neither 1 nor the number of classes (so that wrong broadcasts raise an error). Logged values and
    metrics must be the same with indices and with rows. Values that change with the loss (cross-entropy with class
    weights normalizes rows differently), or between two runs (times), are ignored.
    """
    images, labels = images_and_labels(batch)
    if labels.ndim != 1 or getattr(step, "__self__", None) is not pl_module:
        return None
    size = max(2, len(images))
    rows = torch.arange(size + (size == tap.num_classes), device=images.device) % len(images)

    def rehearse(given: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        twin, twin_tap = copy.deepcopy((pl_module, tap))  # the copy of a module has no trainer
        twin._trainer = _QuietTrainer(pl_module._trainer)
        twin_tap.forget()
        figures = _listen_to(twin)
        out = types.MethodType(step.__func__, twin)(rebuilt(batch, images[rows], given, rows), *args, **kwargs)
        for name, metric in _metrics(twin):
            if metric.update_called:
                _note(figures, name, metric.compute())
        _note(figures, "loss", out.get("loss") if isinstance(out, Mapping) else out)
        return figures, twin_tap.logits

    def quietly(given: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        device = images.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with own_streams(), warnings.catch_warnings(), torch.no_grad(), autocast:
            warnings.simplefilter("ignore")
            return rehearse(given)

    try:
        _, logits = quietly(labels[rows])
        predicted = logits.argmax(1) if logits is not None and logits.shape[:1] == rows.shape else labels[rows]
        plain, again = quietly(predicted)[0], quietly(predicted)[0]
    except Exception:  # index labels fail as well, or the module cannot be copied: training raises the error
        return None
    try:
        soft = quietly(F.one_hot(predicted, tap.num_classes).float())[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    loss_change = soft["loss"] / plain["loss"] if {"loss"} <= plain.keys() & soft.keys() else torch.ones(1)
    for name in plain.keys() & again.keys() & soft.keys():
        before, after = plain[name], soft[name]
        if _close(before, again[name]) and not _close(before, after) and not _close(before * loss_change, after):
            return f"{name} is {_shown(after)} instead of {_shown(before)}"
    return None


def _listen_to(twin: Any) -> dict[str, Tensor]:
    """Reset the metrics of a copied module, and collect its logged values in a dictionary."""
    figures: dict[str, Tensor] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        _note(figures, name, value)

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            _note(figures, name, value)

    twin.log, twin.log_dict = log, log_dict
    for _, metric in _metrics(twin):
        metric.sync_on_compute = metric._to_sync = metric.dist_sync_on_step = False
        metric.reset()
    return figures


def _metrics(module: nn.Module) -> list[tuple[str, Metric]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Metric)]


def _note(figures: dict[str, Tensor], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _note(figures, f"{name}.{key}", part)
    elif isinstance(value, (Tensor, int, float)):
        figures[name] = torch.as_tensor(value).detach().to("cpu", torch.float64).flatten()


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=5e-3, atol=1e-4, equal_nan=True)


def _shown(value: Tensor) -> str:
    return f"{float(value):.4g}" if value.numel() == 1 else str([round(float(part), 4) for part in value[:4]])
