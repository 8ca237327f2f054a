"""Two-component mixtures of per-sample losses, and the posterior that a label is correct."""

import warnings
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

__all__ = ["Mixture", "clean_probability", "finite_losses", "fit_mixture", "mixture_posterior"]


class Mixture(NamedTuple):
    """Mixture of two Gaussians on scaled losses, (loss - low) / (high - low); the component of lower mean is first."""

    low: Tensor
    """The smallest loss of the fit, a scalar; 0 for losses that were not normalized."""
    high: Tensor
    """The largest loss of the fit, a scalar; 1 for losses that were not normalized."""
    weights: Tensor
    """(2,), sum to 1; (1, 0) if all losses are equal."""
    means: Tensor
    """(2,), of the scaled losses."""
    variances: Tensor
    """(2,), of the scaled losses, positive."""


def fit_mixture(losses: Tensor, *, max_iter: int = 10, normalize: bool = True) -> Mixture:
    """Fit two Gaussians to min-max normalized losses.

    Source: DivideMix (Li et al., ICLR 2020), Section 3.1 and its code: max_iter 10, tol 1e-2, reg_covar 5e-4. The
    k-means initialization has a fixed seed, so the fit is deterministic.

    Args:
        losses: shape (N,), finite, on any device.
        max_iter: maximum number of iterations; published: 10 (C2D: 200).
        normalize: whether to normalize the losses to [0, 1]; False for losses in [0, 1], such as means of normalized
            losses over epochs.

    Returns:
        The mixture, on the device of ``losses``. If all losses are equal, or N < 2, it has one component, whose
        posterior is 1.

    Raises:
        ValueError: if ``losses`` is not (N,), or contains NaN or infinity.
    """
    values = finite_losses(losses.detach().to("cpu", torch.float64))
    low, high = (values.min(), values.max()) if len(values) else (torch.zeros(()), torch.zeros(()))
    constant = not bool(high > low)
    if not normalize and not constant:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    device = losses.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if len(values) < 2 or constant:
        one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        fit = Mixture(low, high, one, two, torch.ones(2))
    else:
        model = GaussianMixture(2, max_iter=max_iter, tol=1e-2, reg_covar=5e-4, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the published number of iterations is small
            model.fit(((values - low) / (high - low)).numpy().reshape(-1, 1))
        order = torch.from_numpy(model.means_[:, 0].argsort())
        weights, means, variances = (
            torch.from_numpy(part)[order] for part in (model.weights_, model.means_[:, 0], model.covariances_[:, 0, 0])
        )
        fit = Mixture(low, high, weights, means, variances)
    return Mixture(*(part.to(device, dtype) for part in fit))


def mixture_posterior(mixture: Mixture, losses: Tensor) -> Tensor:
    """Return the posterior probability of the component of lower mean, for losses of the fit or new losses.

    Losses are clamped to the range of the fit, because the wider Gaussian dominates on both sides of it.

    Args:
        mixture: output of :func:`fit_mixture`.
        losses: shape (N,), on the device of ``mixture``.

    Returns:
        Shape (N,), float32, in [0, 1].

    Raises:
        ValueError: if ``losses`` is not (N,), or (on CPU) contains NaN or infinity.
    """
    span = mixture.high - mixture.low
    scaled = (finite_losses(losses).to(mixture.low.dtype) - mixture.low) / torch.where(span > 0, span, 1)
    distance = scaled.clamp(0, 1).unsqueeze(1) - mixture.means  # (N, 2)
    log_joint = mixture.weights.log() - 0.5 * (mixture.variances.log() + distance.square() / mixture.variances)
    return log_joint.softmax(1)[:, 0].float()


def clean_probability(losses: Tensor, *, max_iter: int = 10, normalize: bool = True) -> Tensor:
    """Return the probability that each label of a training set is correct, from its losses.

    Source: DivideMix, Section 3.1; used as the label quality G of SANM's Eq. 2. It combines :func:`fit_mixture` and
    :func:`mixture_posterior`.

    Args:
        losses: shape (N,), finite.
        max_iter: as for :func:`fit_mixture`.
        normalize: as for :func:`fit_mixture`.

    Returns:
        Shape (N,), float32, in [0, 1], 1 = clean. All 1 if the losses are equal or N < 2.

    Raises:
        ValueError: if ``losses`` is not (N,), or contains NaN or infinity.
    """
    return mixture_posterior(fit_mixture(losses, max_iter=max_iter, normalize=normalize), losses)


def finite_losses(losses: Tensor) -> Tensor:
    """Return losses (N,) unchanged; raise ValueError for another shape, or (on CPU) for NaN and infinity."""
    if losses.ndim != 1:
        raise ValueError(f"expected losses (N,), got shape {tuple(losses.shape)}")
    if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
        bad = int((~torch.isfinite(losses)).sum())
        raise ValueError(
            f"expected finite losses, got {bad} NaN or infinite of {len(losses)}; check whether training has diverged"
        )
    return losses
