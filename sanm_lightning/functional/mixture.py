"""Two-component mixtures over per-sample losses, and the posterior that a label is right."""

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

__all__ = ["Mixture", "clean_probability", "fit_mixture", "mixture_posterior"]


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


def _finite(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ValueError(f"expected losses (N,), got shape {tuple(losses.shape)}")
    if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).sum())
        raise ValueError(f"expected finite losses, got {bad} NaN or infinite of {len(losses)}; has training diverged?")
    return losses
