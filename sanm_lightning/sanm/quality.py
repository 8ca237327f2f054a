"""Per-sample evidence -> probability that the given label is right (the G of SANM's Eq. 2).

The paper leaves the estimator open. The one of DivideMix (Li et al., ICLR 2020), which SANM's released code uses, fits two
Gaussians to the losses: a network learns right labels first, so a small loss speaks for a label.
"""

import warnings
from typing import Any, Literal, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from sanm_lightning.per_sample_old import SampleBank

__all__ = [
    "LabelQuality",
    "Mixture",
    "clean_probability",
    "fit_mixture",
    "label_loss",
    "label_margin",
    "mixture_posterior",
]


class Mixture(NamedTuple):
    """Two Gaussians over min-max normalised losses; the component of lower mean comes first."""

    low: Tensor
    """The smallest loss of the fit, a scalar."""
    high: Tensor
    """The largest loss of the fit, a scalar."""
    weights: Tensor
    """(2,), sum to 1. (1, 0) when the losses held nothing to tell apart."""
    means: Tensor
    """(2,), of the normalised losses."""
    variances: Tensor
    """(2,), of the normalised losses, positive."""


def fit_mixture(losses: Tensor, *, max_iter: int = 10) -> Mixture:
    """Fit two Gaussians to min-max normalised losses.

    Source: DivideMix (Li et al., ICLR 2020), Section 3.1 and its code: max_iter 10, tol 1e-2, reg_covar 5e-4. The k-means
    start has a fixed seed here, so the same losses always give the same mixture.

    Args:
        losses: shape (N,), finite, on any device.
        max_iter: iterations at most; the published number is 10 (C2D takes 200).

    Returns:
        The mixture, on the device of ``losses``. Where all losses are equal, or N < 2, every label is trusted: the
        mixture has one component.

    Raises:
        ValueError: if ``losses`` is not (N,), or holds NaN or infinity.
    """
    values = _finite(losses.detach().to("cpu", torch.float64))
    low, high = (values.min(), values.max()) if len(values) else (torch.zeros(()), torch.zeros(()))
    device = losses.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len(values) < 2 or not bool(high > low):
        one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        fit = Mixture(low, high, one, two, torch.ones(2))
    else:
        model = GaussianMixture(2, max_iter=max_iter, tol=1e-2, reg_covar=5e-4, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # few iterations are the published way
            model.fit(((values - low) / (high - low)).numpy().reshape(-1, 1))
        order = torch.from_numpy(model.means_[:, 0].argsort())
        weights, means, variances = (
            torch.from_numpy(part)[order] for part in (model.weights_, model.means_[:, 0], model.covariances_[:, 0, 0])
        )
        fit = Mixture(low, high, weights, means, variances)
    return Mixture(*(part.to(device, dtype) for part in fit))


def mixture_posterior(mixture: Mixture, losses: Tensor) -> Tensor:
    """Score losses, new ones too, under a fitted mixture: the probability of the component of lower mean.

    Losses beyond the range of the fit count as its edge: the wider Gaussian would claim them from both sides.

    Args:
        mixture: from :func:`fit_mixture`.
        losses: shape (N,), on the device of ``mixture``.

    Returns:
        Shape (N,), float32, in [0, 1].

    Raises:
        ValueError: if ``losses`` is not (N,), or (on CPU) holds NaN or infinity.
    """
    span = mixture.high - mixture.low
    scaled = (_finite(losses).to(mixture.low.dtype) - mixture.low) / torch.where(span > 0, span, 1)
    distance = scaled.clamp(0, 1).unsqueeze(1) - mixture.means  # (N, 2)
    log_joint = mixture.weights.log() - 0.5 * (mixture.variances.log() + distance.square() / mixture.variances)
    return log_joint.softmax(1)[:, 0].float()


def clean_probability(losses: Tensor, *, max_iter: int = 10) -> Tensor:
    """Turn the losses of a training set into the probability that each label is right.

    Source: DivideMix, Section 3.1; used as the label quality G of SANM's Eq. 2. :func:`fit_mixture`, then
    :func:`mixture_posterior`.

    Args:
        losses: shape (N,), finite.
        max_iter: as for :func:`fit_mixture`.

    Returns:
        Shape (N,), float32, in [0, 1], 1 = clean. All 1 where the losses are equal or N < 2.

    Raises:
        ValueError: if ``losses`` is not (N,), or holds NaN or infinity.
    """
    return mixture_posterior(fit_mixture(losses, max_iter=max_iter), losses)


def label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample: logits (B, C), targets (B, C) -> (B,) float32, >= 0, small for a trusted label."""
    return -(targets.float() * logits.float().log_softmax(1)).sum(1)


def label_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Best other logit minus the label's: logits (B, C), targets (B, C) -> (B,) float32, small for a trusted label.

    Source: Pleiss et al., NeurIPS 2020, "area under the margin", with the sign turned so that it ranks as a loss does; the
    area is its mean over epochs (``history: mean``).
    """
    logits = logits.float()
    label = targets.argmax(1, keepdim=True)
    others = logits.scatter(1, label, float("-inf"))
    return others.amax(1) - logits.gather(1, label).squeeze(1)


class LabelQuality(nn.Module):
    """Estimate label quality from what the network said of each sample.

    With sample indices: a table of N values, the mean evidence of each sample; once per epoch (:meth:`refresh`) a mixture is
    fitted to it and gives each sample its quality for the next epoch. Without: a window of recent evidence, a mixture fitted
    to it once per epoch, and each batch scored under that.

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
            raise ValueError(f"expected evidence 'loss' or 'margin', got {evidence!r}")
        if not (history in ("last", "mean") or (isinstance(history, float) and 0 < history < 1)):
            raise ValueError(f"expected history 'last', 'mean' or a momentum in (0, 1), got {history!r}")
        if window < 2:
            raise ValueError(f"expected a window of at least 2 samples, got {window}")
        self.evidence, self.history, self.window = evidence, history, window
        momentum = history if isinstance(history, float) else 0.0
        self.bank = SampleBank(0, momentum, running_mean=history == "mean")
        self.quality = torch.ones(0)  # (N,), of the bank's samples; 1 until something is known
        self._recent = torch.zeros(0)  # (W,), a ring of the latest evidence
        self._seen = 0  # samples that went through the ring
        self._mixture: Mixture | None = None
        self._out_of_range: Tensor | None = None  # whether a quality outside [0, 1] was used since the last refresh

    def resize(self, num_samples: int) -> None:
        """Make room for ``num_samples`` training samples, if the room is not already right."""
        if len(self.bank) != num_samples:
            self.bank.resize(num_samples)
            self.quality = torch.ones(num_samples, device=self.bank.value.device)

    def observe(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> None:
        """Note what the network says of unmasked images. No communication, no waiting for the device.

        Args:
            logits: shape (B, C).
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None where samples have no identity.
        """
        evidence = self._evidence(logits, targets)
        if index is not None and len(self.bank):
            self.bank.observe(index, evidence)
            return
        if not len(self._recent):
            self._recent = torch.zeros(self.window, device=evidence.device, dtype=torch.float32)
        place = (self._seen + torch.arange(len(evidence), device=evidence.device)) % self.window
        self._recent.index_copy_(0, place[-self.window :], evidence[-self.window :])
        self._seen += len(evidence)

    def look_later(self, quality: Tensor) -> None:
        """Remember on the device whether a quality (B,) that somebody else made lies outside [0, 1]; :meth:`refresh` raises.

        On the CPU nothing is remembered: there the functions that use it raise at once.
        """
        if quality.device.type != "cpu":
            bad = ~((quality >= 0) & (quality <= 1)).all()
            self._out_of_range = bad if self._out_of_range is None else self._out_of_range | bad

    def refresh(self) -> None:
        """Fit the mixture to the evidence so far; once per epoch. Every rank must call it.

        Raises:
            ValueError: if the evidence holds NaN or infinity, or a quality outside [0, 1] was used since the last call.
        """
        wrong, self._out_of_range = self._out_of_range, None
        if wrong is not None and bool(wrong):
            raise ValueError(
                "expected label quality in [0, 1], got values outside of it (or NaN) in the epoch before; make it a "
                "probability that the given label is right"
            )
        if len(self.bank):
            self.bank.fold()
            seen = self.bank.epochs > 0
            self.quality = torch.ones_like(self.bank.value)
            if bool(seen.any()):
                self.quality[seen] = clean_probability(self.bank.value[seen])
        if self._seen:
            self._mixture = fit_mixture(self._recent[: min(self._seen, self.window)])

    def forward(self, logits: Tensor, targets: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the quality of each sample's label, shape (B,), in [0, 1]; 1 where nothing is known yet.

        Args:
            logits: what the network says now, shape (B, C); read only where samples have no index.
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None.
        """
        if index is not None and len(self.bank):
            return self.quality[index]
        if self._mixture is None:
            return torch.ones(len(logits), device=logits.device)
        return mixture_posterior(self._mixture, self._evidence(logits, targets))

    def _evidence(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (label_loss if self.evidence == "loss" else label_margin)(logits.detach(), targets.detach())

    def get_extra_state(self) -> dict[str, Any]:
        """Return qualities, window position and mixture as tensors and plain Python."""
        mixture = None if self._mixture is None else [part.cpu() for part in self._mixture]
        recent = self._recent.cpu().clone()
        return {"quality": self.quality.cpu().clone(), "recent": recent, "seen": self._seen, "mixture": mixture}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state, whatever the number of samples was before."""
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


def _finite(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ValueError(f"expected losses (N,), got shape {tuple(losses.shape)}")
    if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).sum())
        raise ValueError(f"expected finite losses, got {bad} NaN or infinite of {len(losses)}; has training diverged?")
    return losses
