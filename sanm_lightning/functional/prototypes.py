"""Prototypes of classes by density peaks in feature space, and labels by their similarity."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["class_prototypes", "density_peaks", "select_peaks"]


def density_peaks(features: Tensor, fraction: float = 0.4, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the density of each sample of a class, and its similarity to samples of higher density.

    Source: Han et al., ICCV 2019, Eq. 3 to 5. The density of i is the sum over j of sign(S_ij - S_c), with the cosine
    similarity S and the value S_c that ``fraction`` of the similarities exceed. The sample itself adds 1 to every density.
    Departure: of equal densities, that of the first sample counts as higher. They are integers, and by the formula every
    sample of the highest density would have the smallest similarity.

    Args:
        features: shape (m, D), m >= 1, not necessarily normalized.
        fraction: fraction of the similarities above S_c, in (0, 1).
        chunk: number of rows compared at once. S_c is that of the similarities of the first ``chunk`` rows, which is exact
            for m up to ``chunk``.

    Returns:
        Densities (m,), and the largest similarity to a sample of higher density (m,), or the smallest similarity to any
        sample for the densest. float32.
    """
    rows = F.normalize(features.float(), dim=1)
    similar = (rows[:chunk] @ rows.T).flatten()
    cut = similar.kthvalue(max(1, len(similar) - int(fraction * len(similar) + 1e-6))).values
    parts = rows.split(chunk)
    density = torch.cat([(part @ rows.T - cut).sign().sum(1) for part in parts])
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    nearest = []
    for part, own in zip(parts, rank.split(chunk), strict=True):
        similar = part @ rows.T
        denser = rank < own[:, None]
        highest = similar.masked_fill(~denser, float("-inf")).amax(1)
        nearest.append(torch.where(denser.any(1), highest, similar.amin(1)))
    return density, torch.cat(nearest)


def select_peaks(density: Tensor, similarity: Tensor, count: int, max_similarity: float = 0.95) -> Tensor:
    """Select up to ``count`` samples of highest density whose similarity to denser samples is below a bound.

    Args:
        density: shape (m,), m >= 1, see :func:`density_peaks`.
        similarity: shape (m,), see :func:`density_peaks`.
        count: largest number of prototypes, >= 1.
        max_similarity: bound of the similarity.

    Returns:
        Positions, shape (n,), 1 <= n <= count, densest first; the densest sample alone if none is below the bound.
    """
    order = density.argsort(descending=True, stable=True)
    found = order[similarity[order] < max_similarity][:count]
    return found if len(found) else order[:1]


def class_prototypes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    samples: int,
    count: int,
    generator: torch.Generator,
    fraction: float = 0.4,
    max_similarity: float = 0.95,
) -> Tensor:
    """Return the mean of the normalized prototypes of each class, so that a scalar product is the mean cosine similarity.

    Source: Han et al., ICCV 2019, Section 3.2.

    Args:
        features: shape (N, D), not necessarily normalized.
        labels: shape (N,), int64, in [0, C).
        num_classes: C, number of classes.
        samples: m, number of samples that are drawn from each class; all samples of smaller classes.
        count: largest number of prototypes of a class.
        generator: random generator, on the CPU.
        fraction: as for :func:`density_peaks`.
        max_similarity: as for :func:`select_peaks`.

    Returns:
        Shape (C, D), float32; zeros for classes without samples.
    """
    means = features.new_zeros((num_classes, features.shape[1]), dtype=torch.float32)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    for number in range(num_classes):
        drawn = features[order[labels[order] == number][:samples]]
        if len(drawn):
            peaks = select_peaks(*density_peaks(drawn, fraction), count, max_similarity)
            means[number] = F.normalize(drawn[peaks].float(), dim=1).mean(0)
    return means
