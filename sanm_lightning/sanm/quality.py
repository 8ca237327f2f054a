"""Label quality: the probability that a given label is right (the G of SANM's Eq. 2), and its estimators.

The paper leaves the estimator open. The one of DivideMix (Li et al., ICLR 2020), which SANM's released code uses, fits two
Gaussians to the losses: networks learn right labels first, so that a small loss is evidence for a label.
"""

import copy
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from sanm_lightning.sanm.options import bound_arguments, found_by_path, path_of

__all__ = ["FittedEvidence", "LabelQuality", "QualityEstimator", "QualityFile", "resolve_quality"]


class QualityEstimator(nn.Module):
    """Base class of estimators of label quality, for ``SANM(quality=...)``.

    An estimator that is handed in takes the place of what a method makes of the labels itself. The second network of a method
    gets a deep copy. Its constructor must not read files: a checkpoint is loaded without them. What is known of each sample
    belongs into a :class:`~sanm_lightning.per_sample.SampleState`. Arguments of the constructor are recorded for checkpoints:
    they should be plain Python, or functions that can be imported.
    """

    init_args: dict[str, Any]
    """The arguments that the estimator was made with."""
    needs_evidence = True
    """Whether :meth:`update` reads what the network predicts; without, no pass is made for it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "QualityEstimator":
        """Record the arguments."""
        made = super().__new__(cls)
        try:
            made.__dict__["init_args"] = bound_arguments(cls.__init__, made, *args, **kwargs)
        except TypeError:
            if args or kwargs:  # none: a copy, which is filled afterwards
                raise
            made.__dict__["init_args"] = {}
        return made

    @property
    def options(self) -> dict[str, Any]:
        """Class path and arguments as plain Python, for checkpoints."""
        return {"class_path": path_of(type(self)), "init_args": dict(self.init_args)}

    def update(
        self, logits: Tensor, targets: Tensor, index: Tensor | None = None, features: Tensor | None = None
    ) -> None:
        """Take in what the network predicts for unmasked images. No communication, no wait for the device.

        Args:
            logits: shape (B, C).
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None where samples have no identity.
            features: feature maps of the images, shape (B, D, h, w), where they are at hand.
        """

    def fit(self, module: Any = None) -> None:
        """Do what is done once per epoch; every process calls it.

        Args:
            module: in training; a method of this package has ``predict_train`` for a pass over the training set.
        """

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of each label, shape (B,), in [0, 1]; arguments as for :meth:`update`."""
        raise TypeError(f"expected {type(self).__name__} to define forward(logits, targets, index); add it")

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,), where it is known by index; for records."""
        return None


class FittedEvidence(NamedTuple):
    """The evidence that a mixture was fitted to."""

    evidence: Tensor
    """(M,)."""
    positions: Tensor | None
    """(M,), positions in the training set, on the CPU; None where samples have no identity."""
    mixture: Mixture


class LabelQuality(QualityEstimator):
    """Label quality as the posterior of a mixture of two Gaussians over the losses of the samples.

    With sample indices: a table of N values, the mean evidence of each sample in an epoch; once per epoch (:meth:`fit`) a
    mixture is fitted to it and gives each sample its quality for the next epoch. Without: a window of recent evidence, a
    mixture fitted to it once per epoch, and each batch scored under that.

    Args:
        evidence: ``"loss"`` is the cross-entropy (DivideMix); ``"margin"`` the best other logit minus the label's.
        history: ``"last"`` uses the last epoch's evidence; ``"mean"`` the mean of all epochs so far; a number in (0, 1)
            a running mean with that momentum.
        window: number of recent samples that the mixture is fitted to where samples have no index.

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
            raise ValueError(f"expected evidence 'loss' or 'margin', got {evidence!r}; choose one")
        if not (history in ("last", "mean") or (isinstance(history, float) and 0 < history < 1)):
            raise ValueError(f"expected history 'last', 'mean' or a momentum in (0, 1), got {history!r}; choose one")
        if window < 2:
            raise ValueError(f"expected a window of at least 2 samples, got {window}; raise it")
        self.evidence, self.history, self.window = evidence, history, window
        momentum = history if isinstance(history, float) else 0.0
        self.bank = EpochMean(momentum, running_mean=history == "mean")
        self.bank.required = False  # without indices, a window of recent samples serves
        self.quality = torch.ones(0)  # (N,), of the samples of the bank; empty until something is known
        self._recent = torch.zeros(0)  # (W,), a ring of the latest evidence
        self._seen = 0  # samples that went through the ring
        self._mixture: Mixture | None = None

    def reset(self, num_samples: int) -> None:
        """Forget everything, and make room for ``num_samples`` training samples; a trainer's callback does so by itself."""
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
        """Fit the mixture to the evidence so far; once per epoch, in every process.

        Raises:
            ValueError: if the evidence holds NaN or infinity.
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
        """Quality of each training sample, (N,); None where nothing was recorded by index."""
        return self.quality if len(self.quality) and bool(self.bank.epochs.any()) else None

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of each sample's label, shape (B,), in [0, 1]; 1 where nothing is known yet.

        Args:
            logits: present predictions, shape (B, C); read only where samples have no index.
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
        """Return qualities, window position and mixture as tensors and plain Python."""
        mixture = None if self._mixture is None else [part.cpu() for part in self._mixture]
        recent = self._recent.cpu().clone()
        return {"quality": self.quality.cpu().clone(), "recent": recent, "seen": self._seen, "mixture": mixture}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state of any number of samples."""
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


class QualityFile(QualityEstimator):
    """Label quality from a file, fixed for the whole training.

    The file is read when a training begins, and not in the constructor; checkpoints hold the values.

    Args:
        path: a ``.npy`` file of shape (N,), a ``.npz`` file, or a ``.csv`` file with a header, with one value in [0, 1] per
            training sample, in the order of the training set.
        key: name of the array or column, by default ``quality``.
    """

    needs_evidence = False

    def __init__(self, path: str, key: str = "quality") -> None:
        super().__init__()
        self.path, self.key = path, key
        self.table: Any = SampleState()
        self.table.add_state("quality", default=1.0, dist_reduce_fx=None)
        self.table.add_state("known", dtype=torch.bool, dist_reduce_fx=None)

    def fit(self, module: Any = None) -> None:
        """Read the file, unless the values are known.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it does not hold N values in [0, 1].
        """
        if bool(self.table.known.any()):
            return
        values = self._read()
        if values.shape != (len(self.table),) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"expected {len(self.table)} values in [0, 1] in {self.path!r}, one per training sample, got shape "
                f"{tuple(values.shape)} from {float(values.min()) if values.numel() else None} to "
                f"{float(values.max()) if values.numel() else None}; make the file for this training set"
            )
        self.table.quality = values.to(self.table.device, torch.float32)
        self.table.known = torch.ones_like(self.table.known)

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
                f"expected label quality under {self.key!r} in {self.path!r}, got a file that cannot be read so ({error}); "
                "give a .npy, .npz or .csv file and the name of the array or column"
            ) from error

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the values of the samples, (B,); 1 before the file is read."""
        if index is None:
            raise ValueError(
                "expected batches with positions in the training set for quality from a file, got none; use a data module of "
                "this package, or batches NoisyBatch(images, labels, index)"
            )
        quality: Tensor = self.table.quality[index]
        return quality

    @property
    def values(self) -> Tensor | None:
        """Quality of each training sample, (N,); None before the file is read."""
        quality: Tensor = self.table.quality
        return quality if bool(self.table.known.any()) else None


def resolve_quality(quality: Any) -> QualityEstimator | None:
    """Return the estimator that ``SANM(quality=...)`` names, a copy of its own; None for ``"estimated"`` and ``"oracle"``.

    Args:
        quality: None, ``"estimated"``, ``"oracle"``, an estimator, or the options of one, as checkpoints hold them.

    Raises:
        ValueError: if it is none of these.
    """
    if quality in (None, "estimated", "oracle"):
        return None
    if isinstance(quality, dict) and "class_path" in quality:
        kind = found_by_path(quality["class_path"])
        if isinstance(kind, type) and issubclass(kind, QualityEstimator):
            return kind(**(quality.get("init_args") or {}))
    if isinstance(quality, QualityEstimator):
        return copy.deepcopy(quality)
    raise ValueError(
        f"SANM expected quality 'estimated', 'oracle' or a QualityEstimator, got {quality!r}; choose one of them"
    )
