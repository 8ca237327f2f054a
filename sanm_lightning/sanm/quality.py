"""Estimators of label quality, the probability that a given label is correct (G in SANM's Eq. 2).

The paper does not specify the estimator. That of DivideMix (Li et al., ICLR 2020), used in SANM's released code, fits
two Gaussians to the losses: networks learn correct labels first, so a small loss is evidence for a correct label.
"""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from sanm_lightning.functional import (
    Mixture,
    clean_probability,
    fit_mixture,
    label_margin,
    mixture_posterior,
    soft_cross_entropy,
)
from sanm_lightning.per_sample import EpochMean, SampleState
from sanm_lightning.random_streams import several_processes
from sanm_lightning.sanm.options import bound_arguments, created_from, path_of

__all__ = ["FittedEvidence", "LabelQuality", "QualityEstimator", "QualityFile", "TableQuality", "resolve_quality"]


class QualityEstimator(nn.Module):
    """Base class of estimators of label quality, for ``SANM(quality=...)``.

    An estimator passed to SANM replaces a method's estimate of label quality. The second network of a method uses a
    deep copy. The constructor must not read files, which may be missing when a checkpoint is loaded. Store per-sample
    values in a :class:`~sanm_lightning.per_sample.SampleState`. The arguments of the constructor are saved in
    checkpoints and should be built-in types or importable functions.
    """

    init_args: dict[str, Any]
    """The constructor arguments."""
    needs_evidence = True
    """Whether :meth:`update` uses the predictions; otherwise no forward pass is run for it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "QualityEstimator":
        """Record the arguments."""
        made = super().__new__(cls)
        try:
            made.__dict__["init_args"] = bound_arguments(cls.__init__, made, *args, **kwargs)
        except TypeError:
            if args or kwargs:  # without arguments: a copy, whose attributes are set afterwards
                raise
            made.__dict__["init_args"] = {}
        return made

    @property
    def options(self) -> dict[str, Any]:
        """Class path and arguments as built-in types, for checkpoints."""
        return {"class_path": path_of(type(self)), "init_args": dict(self.init_args)}

    def update(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Update the estimator with predictions for unmasked images, without communication or device synchronization.

        Args:
            logits: predictions, shape (B, C).
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,); None if unknown.
            features: feature maps of the images, shape (B, D, h, w), if available.
        """

    def fit(self, module: Any = None) -> None:
        """Fit the estimator; called once per epoch, in every process.

        Args:
            module: the trained module; methods of this package have ``predict_train`` for a pass over the training set.
        """

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of each label, shape (B,), in [0, 1]; arguments as for :meth:`update`."""
        raise TypeError(
            f"expected {type(self).__name__} to define forward(logits, targets, index), got no such method; add it"
        )

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,), if known by index; for results."""
        return None


class FittedEvidence(NamedTuple):
    """The evidence that a mixture was fitted to."""

    evidence: Tensor
    """(M,)."""
    positions: Tensor | None
    """(M,), positions in the training set, on the CPU; None where samples have no identity."""
    mixture: Mixture


class LabelQuality(QualityEstimator):
    """Label quality as the posterior of a mixture of two Gaussians on the losses of the samples.

    With sample indices, a mixture is fitted once per epoch (:meth:`fit`) to a table of N values, the mean evidence of
    each sample in an epoch; its posterior is the quality of each sample in the next epoch. Without indices, a mixture
    is fitted once per epoch to a window of recent evidence, and each batch is scored with that mixture.

    Args:
        evidence: ``"loss"`` is the cross-entropy (DivideMix); ``"margin"`` is the largest other logit minus that of the
            label.
        history: ``"last"`` uses the evidence of the last epoch; ``"mean"`` the mean over all epochs so far; a number in
            (0, 1) a running mean with that momentum.
        window: number of recent samples for the fit without indices.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        evidence: Literal["loss", "margin"] = "loss",
        history: Literal["last", "mean"] | float = "last",
        window: int = 4096,
    ) -> None:
        super().__init__()
        if evidence not in ("loss", "margin"):
            raise ValueError(f"expected evidence 'loss' or 'margin', got {evidence!r}; choose one of them")
        if not (history in ("last", "mean") or (isinstance(history, float) and 0 < history < 1)):
            raise ValueError(
                f"expected history 'last', 'mean' or a momentum in (0, 1), got {history!r}; choose one of them"
            )
        if window < 2:
            raise ValueError(f"expected a window of at least 2 samples, got {window}; raise it")
        self.evidence, self.history, self.window = evidence, history, window
        momentum = history if isinstance(history, float) else 0.0
        self.bank = EpochMean(momentum, running_mean=history == "mean")
        self.bank.required = False  # without indices, a window of recent samples is used
        self.quality = torch.ones(0)  # (N,), of the samples of the bank; empty before the first fit
        self._recent = torch.zeros(0)  # (W,), ring buffer of recent evidence
        self._seen = 0  # number of samples written to the ring buffer
        self._mixture: Mixture | None = None

    def reset(self, num_samples: int) -> None:
        """Reset the estimator for ``num_samples`` training samples; a trainer does so through its callback."""
        self.bank.reset(num_samples)
        self.quality = torch.ones(num_samples, device=self.bank.device)

    def update(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Record the evidence of unmasked images, see :meth:`QualityEstimator.update`."""
        evidence = self._evidence(logits, targets)
        if index is not None and len(self.bank):
            self.bank.update(index, evidence)
            return
        if not len(self._recent):
            self._recent = torch.zeros(self.window, device=evidence.device, dtype=torch.float32)
        place = (self._seen + torch.arange(len(evidence), device=evidence.device)) % self.window
        self._recent.index_copy_(0, place[-self.window :], evidence[-self.window :])
        self._seen += len(evidence)

    def fit(self, module: Any = None) -> None:
        """Fit the mixture to the recorded evidence; call it once per epoch, in every process.

        Raises:
            ValueError: if the evidence contains NaN or infinity.
        """
        if len(self.bank):
            values = self.bank.compute()
            seen = self.bank.epochs > 0
            self.quality = torch.ones_like(values)
            if bool(seen.any()):
                self.quality[seen] = clean_probability(values[seen])
        if self._seen:
            self._mixture = fit_mixture(self._recent[: min(self._seen, self.window)])

    def fitted(self) -> FittedEvidence | None:
        """Return the evidence of the last :meth:`fit` and its mixture, for plots; None before. No communication."""
        if len(self.bank) and bool(self.bank.epochs.any()):
            seen = self.bank.epochs.nonzero()[:, 0]
            values = self.bank.value[seen]
            return FittedEvidence(values, seen.cpu(), fit_mixture(values))
        if self._mixture is None:
            return None
        return FittedEvidence(self._recent[: min(self._seen, self.window)], None, self._mixture)

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,); None if nothing was recorded by index."""
        return self.quality if len(self.quality) and bool(self.bank.epochs.any()) else None

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of each label, shape (B,), in [0, 1]; 1 before the first fit.

        Args:
            logits: current predictions, shape (B, C); used without index only.
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None.
        """
        if index is not None and len(self.bank):
            known = len(self.quality) == len(self.bank)
            return self.quality[index] if known else torch.ones_like(index, dtype=torch.float32)
        if self._mixture is None:
            return torch.ones(len(logits), device=logits.device)
        return mixture_posterior(self._mixture, self._evidence(logits, targets))

    def _evidence(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (soft_cross_entropy if self.evidence == "loss" else label_margin)(logits.detach(), targets.detach())

    def get_extra_state(self) -> dict[str, Any]:
        """Return qualities, window position and mixture as tensors and built-in types."""
        mixture = None if self._mixture is None else [part.cpu() for part in self._mixture]
        recent = self._recent.cpu().clone()
        return {"quality": self.quality.cpu().clone(), "recent": recent, "seen": self._seen, "mixture": mixture}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state of any number of samples."""
        device = self.bank.value.device
        self.quality, self._recent = state["quality"].to(device).clone(), state["recent"].to(device).clone()
        self._seen = state["seen"]
        mixture = state["mixture"]
        self._mixture = None if mixture is None else Mixture(*(part.to(device) for part in mixture))

    def _apply(self, fn: Any, recurse: bool = True) -> "LabelQuality":
        super()._apply(fn, recurse)
        device = fn(self.quality).device
        self.quality, self._recent = self.quality.to(device), self._recent.to(device)
        if self._mixture is not None:
            self._mixture = Mixture(*(part.to(device) for part in self._mixture))
        return self


class TableQuality(QualityEstimator):
    """Base class of estimators that store the quality of each training sample in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = SampleState()
        self.table.required = False
        self.table.add_state("quality", default=1.0, dist_reduce_fx=None)
        self.table.add_state("known", dtype=torch.bool, dist_reduce_fx=None)

    def _set(self, quality: Tensor) -> None:
        quality = quality.to(self.table.device, torch.float32).contiguous()
        if several_processes():
            torch.distributed.broadcast(quality, 0)  # identical on all ranks, independent of numerical differences
        if len(self.table) != len(quality):
            self.table.reset(len(quality))
        self.table.quality = quality
        self.table.known = torch.ones_like(self.table.known)

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of the samples, shape (B,); 1 until it is estimated."""
        if index is None:
            raise ValueError(
                f"expected batches with positions in the training set for {type(self).__name__}, got none; use a data module "
                "of this package, or return named tuples with the fields image, label and index from the data set"
            )
        if not len(self.table):
            return torch.ones_like(index, dtype=torch.float32)
        quality: Tensor = self.table.quality[index]
        return quality

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,); None until it is estimated."""
        quality: Tensor = self.table.quality
        return quality if bool(self.table.known.any()) else None


class QualityFile(TableQuality):
    """Label quality from a file, constant during training.

    The file is read at the start of training, not in the constructor; checkpoints contain the values.

    Args:
        path: a ``.npy`` file of shape (N,), a ``.npz`` file, or a ``.csv`` file with a header, with one value in [0, 1]
            per training sample, in the order of the training set.
        key: name of the array or column.
    """

    needs_evidence = False

    def __init__(self, path: str, key: str = "quality") -> None:
        super().__init__()
        self.path, self.key = path, key
        self.table.required = True

    def fit(self, module: Any = None) -> None:
        """Read the file, unless the values are loaded.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file does not contain N values in [0, 1].
        """
        if bool(self.table.known.any()):
            return
        values = self._read()
        if values.shape != (len(self.table),) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"expected {len(self.table)} values in [0, 1] in {self.path!r}, one per training sample, got shape "
                f"{tuple(values.shape)} from {float(values.min()) if values.numel() else None} to "
                f"{float(values.max()) if values.numel() else None}; use a file for this training set"
            )
        self._set(values)

    def _read(self) -> Tensor:
        path = Path(self.path)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected a file of label quality in {self.path!r}, got no such file; check the path"
            )
        try:
            if path.suffix == ".csv":
                table = np.genfromtxt(path, delimiter=",", names=True, encoding="utf-8")
                return torch.from_numpy(np.atleast_1d(table[self.key]).astype(np.float32))
            held = np.load(path, allow_pickle=False)
            return torch.from_numpy(np.asarray(held if path.suffix == ".npy" else held[self.key], dtype=np.float32))
        except (ValueError, KeyError, OSError, IndexError) as error:
            raise ValueError(
                f"expected label quality under {self.key!r} in {self.path!r}, got {type(error).__name__}: {error}; use "
                "a .npy, .npz or .csv file, and set key to the name of the array or column"
            ) from error


def resolve_quality(quality: Any) -> QualityEstimator | None:
    """Convert the ``quality`` option of SANM to an estimator.

    Args:
        quality: None, ``"estimated"``, ``"oracle"``, an estimator, or the options of an estimator, as in checkpoints.

    Returns:
        A copy of the estimator; None for None, ``"estimated"`` and ``"oracle"``.

    Raises:
        ValueError: if it is none of these.
    """
    if quality in (None, "estimated", "oracle"):
        return None
    if isinstance(quality, dict) and "class_path" in quality:
        return cast(QualityEstimator, created_from(QualityEstimator, quality))
    if isinstance(quality, QualityEstimator):
        return copy.deepcopy(quality)
    raise ValueError(
        f"expected quality 'estimated', 'oracle' or a QualityEstimator, got {quality!r}; choose one of them"
    )
