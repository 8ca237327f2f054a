"""Run the training step of a third-party module on a copy, to detect steps that do not accept class probabilities."""

import contextlib
import copy
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from sanm_lightning.sanm.feature_extractor import FeatureExtractor
from sanm_lightning.sanm.foreign_batch import images_and_labels, rebuilt
from sanm_lightning.sanm.inference import is_out_of_memory

__all__ = ["misread_labels", "own_streams", "require_probabilities"]


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


def require_probabilities(
    pl_module: L.LightningModule, tap: FeatureExtractor, step: Any, batch: Any, args: Any, kwargs: Any
) -> None:
    """Check that a training step means the same by class indices and by one-hot rows.

    Raises:
        MisconfigurationException: if its loss, logged values or metrics differ.
    """
    owner = type(pl_module).__name__
    found = misread_labels(pl_module, tap, step, batch, args, kwargs)
    if isinstance(found, Difference) and found.name == LOSS:
        raise MisconfigurationException(
            f"expected a loss of {owner} with the same value for class indices and their one-hot rows (B, C), got "
            f"{_shown(found.indices)} and {_shown(found.rows)}, as with class weights; use F.cross_entropy(..., "
            "reduction='sum') / len(y) with weights of mean 1, which is the same for both, or SANM(labels=False), which keeps "
            "the labels unchanged"
        )
    if found is not None:
        raise MisconfigurationException(
            f"expected a training step of {owner} that accepts class probabilities (B, C), got one that reads its labels as "
            f"class indices ({found}); use 'y if y.ndim == 1 else y.argmax(1)' as indices, or SANM(labels=False), which keeps "
            "the labels unchanged"
        )


class Difference(NamedTuple):
    """A value that differs between class indices and one-hot rows."""

    name: str
    indices: Tensor
    rows: Tensor

    def __str__(self) -> str:
        return f"{self.name} is {_shown(self.rows)} instead of {_shown(self.indices)}"


LOSS = "loss of the step"


def misread_labels(
    pl_module: L.LightningModule, tap: FeatureExtractor, step: Any, batch: Any, args: Any, kwargs: Any
) -> Difference | str | None:
    """Find a difference of a training step with one-hot rows instead of class indices, or the error of rows; or None.

    The step runs on copies of the module, with a batch size that is neither 1 nor the number of classes (so that wrong
    broadcasts raise an error). Losses are compared with labels of all classes (so that class weights show), logged
    values and metrics with the predicted labels (so that no accuracy is zero by chance). Values that change between two
    runs (times) are ignored.
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
        _note(figures, LOSS, out.get("loss") if isinstance(out, Mapping) else out)
        return figures, twin_tap.logits

    def quietly(given: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        device = images.device.type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with own_streams(), warnings.catch_warnings(), torch.no_grad(), autocast:
            warnings.simplefilter("ignore")
            return rehearse(given)

    def one_hot(given: Tensor) -> Tensor:
        return F.one_hot(given.long(), tap.num_classes).float()

    every_class = (torch.arange(len(rows), device=labels.device) % tap.num_classes).to(labels.dtype)
    try:
        copy.deepcopy((pl_module, tap))
    except Exception as error:
        rank_zero_warn(
            f"expected {type(pl_module).__name__} to be copyable, to check its training step with class probabilities, got "
            f"{type(error).__name__}: {error}; check that the loss is the same for class indices and one-hot rows"
        )
        return None
    try:
        each, logits = quietly(every_class)
        predicted = logits.argmax(1) if logits is not None and logits.shape[:1] == rows.shape else every_class
        predicted = predicted.to(labels.dtype)
        plain, again = quietly(predicted)[0], quietly(predicted)[0]
    except Exception as error:
        _require_classes(error, lambda: quietly(labels[rows]), pl_module, tap)
        return None  # index labels fail as well: training raises the error
    try:
        soft, each_soft = quietly(one_hot(predicted))[0], quietly(one_hot(every_class))[0]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {error}"
    steady = {name for name in plain.keys() & again.keys() if _close(plain[name], again[name])}
    compared = [(name, plain, soft) for name in sorted(steady)]
    if LOSS in steady:
        compared.insert(0, (LOSS, each, each_soft))
    for name, before, after in compared:
        if name in before and name in after and not _close(before[name], after[name]):
            return Difference(name, before[name], after[name])
    return None


def _require_classes(
    error: Exception, rehearsed: Callable[[], object], pl_module: L.LightningModule, tap: FeatureExtractor
) -> None:
    """Raise an error if a step fails with labels of all classes, but not as ``rehearsed`` with the labels of its batch."""
    try:
        rehearsed()
    except Exception:
        return
    network, reason = type(tap.network).__name__, str(error).split("\n")[0].rstrip(".")
    raise MisconfigurationException(
        f"expected a training step of {type(pl_module).__name__} with the {tap.num_classes} classes of {network}, got "
        f"{type(error).__name__} for labels of all of them ({reason}); set network= to the submodule that returns the logits"
    ) from error


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
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        figures[name] = value.detach().cpu().flatten()


def _close(one: Tensor, other: Tensor) -> bool:
    """Return whether two values are equal within the rounding of their dtypes, at least 0.5 %; those in bf16 within 3 %."""
    rounding = max(torch.finfo(part.dtype).eps if part.is_floating_point() else 0.0 for part in (one, other))
    tolerance = {"rtol": max(5e-3, 4 * rounding), "atol": 1e-4}
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), equal_nan=True, **tolerance)


def _shown(value: Tensor) -> str:
    return f"{float(value):.4g}" if value.numel() == 1 else str([round(float(part), 4) for part in value[:4]])
