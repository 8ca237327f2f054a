"""Two-component Beta mixture of per-sample losses (M-correction)."""

from typing import NamedTuple

import torch
from torch import Tensor

from sanm_lightning.functional.mixture import finite_losses

__all__ = ["BetaMixture", "beta_mixture_posterior", "fit_beta_mixture"]

BINS = 100
OUTLIERS = 0.05
SHIFT = 1e-5
EDGE = 1e-4
LIMIT = 1e-3
TINY = 1e-12


class BetaMixture(NamedTuple):
    """Mixture of two Beta distributions on scaled losses, (loss - low) / (high - low), as a table of its posterior."""

    low: Tensor
    """The 5th percentile of the losses plus 1e-5, a scalar."""
    high: Tensor
    """The 95th percentile of the losses, a scalar."""
    means: Tensor
    """(2,): means of the components on scaled losses; the component of wrong labels is second."""
    table: Tensor
    """(100,): posterior probability of the second component on equal bins of [0, 1]."""


def fit_beta_mixture(losses: Tensor, *, max_iter: int = 10) -> BetaMixture:
    """Fit two Beta distributions to losses between their 5th and 95th percentile, scaled to (0, 1).

    Source: Arazo et al., ICML 2019, Section 3.1, and the authors' code: expectation maximization with weighted moments from
    Beta(1, 2) and Beta(2, 1) with equal weights. The posterior of the second component is tabulated on 100 bins, and constant
    after its maximum, so that it does not decrease for the largest losses.

    Args:
        losses: shape (N,), finite, on any device.
        max_iter: number of iterations; published: 10.

    Returns:
        The mixture, on the device of ``losses``. Without a distribution to fit (N < 2, equal losses, or a component of a single
        value), or if the mean of the second component is not the larger one, the table is 0: no label counts as wrong.

    Raises:
        ValueError: if ``losses`` is not (N,), or contains NaN or infinity.
    """
    values = finite_losses(losses.detach().to("cpu", torch.float64))
    means, table = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    low, high = (
        torch.quantile(values, torch.tensor([OUTLIERS, 1 - OUTLIERS], dtype=torch.float64))
        if len(values)
        else torch.zeros(2, dtype=torch.float64)
    )
    if bool(high > low):
        kept = values[(values >= low) & (values <= high)]
        low = low + SHIFT
        scaled = _scale(kept, low, high).clamp(EDGE, 1 - EDGE)
        alpha, beta = torch.tensor([1.0, 2.0]).double(), torch.tensor([2.0, 1.0]).double()
        weights = torch.tensor([0.5, 0.5]).double()
        for _ in range(max_iter):
            joint = _joint(scaled, alpha, beta, weights).clamp(min=TINY)
            share = joint / joint.sum(0)
            alpha, beta = _moments(scaled, share)
            weights = share.sum(1) / share.sum()
        found = alpha / (alpha + beta)
        joint = _joint(torch.linspace(TINY, 1 - TINY, BINS, dtype=torch.float64), alpha, beta, weights)
        posterior = joint[1] / (joint.sum(0) + TINY)
        if bool(found[1] > found[0]) and bool(torch.isfinite(posterior).all()):
            largest = int(posterior.argmax())
            posterior[largest:] = posterior[largest]
            means, table = found, posterior
    device = losses.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return BetaMixture(*(part.to(device, dtype) for part in (low, high, means, table)))


def beta_mixture_posterior(mixture: BetaMixture, losses: Tensor) -> Tensor:
    """Return the posterior probability that each label is wrong, for losses of the fit or new losses.

    Args:
        mixture: output of :func:`fit_beta_mixture`.
        losses: shape (B,), on the device of ``mixture``.

    Returns:
        Shape (B,), float32, in [0, 1].
    """
    scaled = _scale(losses.detach().to(mixture.low.dtype), mixture.low, mixture.high)
    return mixture.table[(scaled * BINS).long()].float()


def _scale(losses: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale losses (n,) to (0, 1), with the constants of the authors' code; values outside are moved to the inside."""
    scaled = (losses - low) / (high - low + 1e-6)
    return torch.where(scaled >= 1, 1 - LIMIT, torch.where(scaled <= 0, LIMIT, scaled))


def _joint(values: Tensor, alpha: Tensor, beta: Tensor, weights: Tensor) -> Tensor:
    """Return weight times density of both components, values (n,) -> (2, n)."""
    a, b = alpha[:, None], beta[:, None]
    log_density = (a - 1) * values.log() + (b - 1) * (-values).log1p()
    log_density = log_density + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return weights[:, None] * log_density.exp()


def _moments(values: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameters of the Beta distributions with the weighted mean and variance of ``values`` (n,)."""
    total = share.sum(1)
    mean = (share * values).sum(1) / total
    variance = (share * (values - mean[:, None]).square()).sum(1) / total
    alpha = mean * (mean * (1 - mean) / variance - 1)
    return alpha, alpha * (1 - mean) / mean
