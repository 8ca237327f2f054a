"""Contrastive losses on normalized embeddings, and the pairs that they attract."""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.functional.losses import masked_mean, soft_cross_entropy
from sanm_lightning.functional.targets import Mixed

__all__ = [
    "ContrastKeys",
    "MixedViews",
    "instance_contrast",
    "interpolated_contrast",
    "pair_similarity",
    "partnered_contrast",
    "prototype_contrast",
    "queue_contrast",
    "selected_pairs",
    "view_positives",
]


class MixedViews(NamedTuple):
    """Embeddings of two mixed views of B samples, first views, then second views."""

    embeddings: Tensor
    """(2 B, P), normalized."""
    lam: Tensor
    """(2 B,), weight of the larger part of each view, in [1/2, 1]."""
    partners: Tensor
    """(2 B,), position of the sample that each view is mixed with."""

    @classmethod
    def of(cls, embeddings: list[Tensor], mixed: list[Mixed]) -> "MixedViews":
        """Join the two views, embeddings (B, P) each, that were mixed with one weight per view."""
        lam = [torch.full_like(rows[:, 0], cast(float, view.lam)) for rows, view in zip(embeddings, mixed, strict=True)]
        return cls(torch.cat(embeddings), torch.cat(lam), torch.cat([view.partners for view in mixed]))


class ContrastKeys(NamedTuple):
    """Keys of a contrast of mixed views, and the weights of the positive pairs of the V views and the M keys."""

    embeddings: Tensor
    """(M, P), normalized; the first rows are those of the same views."""
    probs: Tensor
    """(M, C), predicted class probabilities."""
    major: Tensor
    """(V, M), weights of the positive pairs of the larger part of each view, see :func:`view_positives`."""
    minor: Tensor
    """(V, M), likewise of the smaller part."""
    valid: Tensor | None = None
    """(M,) bool: whether a row is used; None uses all rows."""


def instance_contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding the other view of each image among both views of all images.

    Source: RRL (Li et al., ICCV 2021), Eq. 3, with the negatives of the authors' code.

    Args:
        one: normalized embeddings of the first views, shape (B, P).
        other: normalized embeddings of the second views, shape (B, P).
        temperature: temperature, positive.

    Returns:
        Shape (B,), >= 0.
    """
    rows = torch.arange(len(one), device=one.device)
    same = (one @ one.T).masked_fill(rows[:, None] == rows, float("-inf"))
    return F.cross_entropy(torch.cat([one @ other.T, same], 1).float() / temperature, rows, reduction="none")


def prototype_contrast(
    embeddings: Tensor, prototypes: Tensor, targets: Tensor, temperature: float, among: Tensor
) -> Tensor:
    """Return the cross-entropy of the similarity of embeddings to class prototypes.

    Source: RRL (Li et al., ICCV 2021), prototypical contrast.
    Departure: the mean over no row is 0, where that of the authors' code is NaN.

    Args:
        embeddings: normalized embeddings, shape (V, P).
        prototypes: normalized class means, shape (C, P).
        targets: class probabilities, shape (V, C).
        temperature: temperature, positive.
        among: rows that are averaged, shape (V,), bool.

    Returns:
        A scalar, >= 0; 0 without rows.
    """
    return masked_mean(soft_cross_entropy(embeddings @ prototypes.T / temperature, targets), among)


def queue_contrast(queries: Tensor, keys: Tensor, negatives: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding the key of each query among the embeddings of a queue.

    Source: MoCo (He et al., CVPR 2020), Eq. 1.

    Args:
        queries: normalized embeddings, shape (B, P).
        keys: normalized embeddings of other views of the same images, shape (B, P).
        negatives: normalized embeddings of other images, shape (K, P).
        valid: whether a row of ``negatives`` is used, shape (K,), bool.
        temperature: temperature, positive.

    Returns:
        Shape (B,), >= 0; 0 without valid negatives.
    """
    positive = (queries * keys).sum(1, keepdim=True)
    negative = (queries @ negatives.T).masked_fill(~valid, float("-inf"))
    logits = torch.cat([positive.float(), negative.float()], 1) / temperature
    return logits.logsumexp(1) - logits[:, 0]


def view_positives(pairs: Tensor, partners: Tensor, queued: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights of positive pairs of two mixed views of a batch with these views, and with the rows of a queue.

    Source: MOIT (Ortego et al., CVPR 2021), Section 3.1. As in the authors' code, the views of the image that a view is mixed
    with have weight 2.

    Args:
        pairs: which samples attract each other, shape (B, B), bool; true on the diagonal.
        partners: position of the sample that each view is mixed with, shape (2 B,): first views, then second views.
        queued: which samples attract the rows of a queue, shape (B, K), bool; None has no queue.

    Returns:
        Weights for the larger and for the smaller part of each mixed view, shape (2 B, 2 B + K), 0, 1 or 2; 0 for a view with
        itself.
    """
    samples = torch.arange(len(pairs), device=pairs.device)
    other = ~torch.eye(2 * len(pairs), dtype=torch.bool, device=pairs.device)
    major = pairs.float().repeat(2, 2) * other
    minor = (pairs[partners].float() + (partners[:, None] == samples)).repeat(1, 2) * other
    if queued is None:
        return major, minor
    return torch.cat([major, queued.repeat(2, 1)], 1), torch.cat([minor, queued[partners]], 1)


def interpolated_contrast(
    embeddings: Tensor,
    others: Tensor,
    lam: Tensor,
    major: Tensor,
    minor: Tensor,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Return the supervised contrastive loss of mixed views, weighted like their images.

    Source: MOIT (Ortego et al., CVPR 2021), Eq. 2 to 4.

    Args:
        embeddings: normalized embeddings of V mixed views, shape (V, P), V >= 2.
        others: normalized embeddings that they are compared with, shape (M, P); the first V are those of the same views, with
            which a view is not compared itself.
        lam: weight of the larger part of each view, shape (V,), in [0, 1].
        major: weights of the positive pairs of the larger part, shape (V, M), integers, >= 0, and 0 for rows that are not used.
        minor: weights of the positive pairs of the smaller part, likewise.
        temperature: temperature, positive.
        valid: whether a row of ``others`` is used, shape (M,), bool; None uses all rows.

    Returns:
        Shape (V,); a part without positive pairs has loss 0.
    """
    logits = (embeddings @ others.T).float() / temperature
    kept = _compared(logits, valid)
    log_probs = logits - logits.masked_fill(~kept, float("-inf")).logsumexp(1, keepdim=True)
    parts = [(weight * log_probs).sum(1) / weight.sum(1).clamp(min=1) for weight in (major, minor)]
    return -lam * parts[0] - (1 - lam) * parts[1]


def partnered_contrast(views: MixedViews, compared: ContrastKeys, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean :func:`interpolated_contrast` of two mixed views, in which samples without a partner count as 0.

    Source: the code of Sel-CL (Li et al., CVPR 2022).

    Args:
        views: two mixed views of B samples.
        compared: rows that they are compared with.
        temperature: temperature, positive.

    Returns:
        A scalar; and which samples have a partner, a positive pair beside the other view of the sample, shape (B,), bool.
    """
    losses = interpolated_contrast(
        views.embeddings, compared.embeddings, views.lam, compared.major, compared.minor, temperature, compared.valid
    )
    partnered = compared.major[: len(views.lam) // 2].sum(1) > 1
    return (losses * partnered.repeat(2)).mean(), partnered


def pair_similarity(
    probs: Tensor, others: Tensor, lam: Tensor, major: Tensor, minor: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Return the binary cross-entropy of the probabilities that two mixed views have the same class.

    Source: Sel-CL (Li et al., CVPR 2022), Eq. 10, and the authors' code.
    Departure: positive pairs have label 1; in the code, some have label 2.

    Args:
        probs: predicted class probabilities of V views, shape (V, C).
        others: class probabilities that they are compared with, shape (M, C), as in :func:`interpolated_contrast`.
        lam: weight of the larger part of each view, shape (V,).
        major: positive pairs of the larger part, shape (V, M); weights above 1 count as 1.
        minor: positive pairs of the smaller part, shape (V, M).
        valid: whether a row of ``others`` is used, shape (M,), bool; None uses all rows.

    Returns:
        A scalar, the sum over the compared pairs divided by V M.
    """
    same = (probs @ others.to(probs.dtype).T).float().clamp(0, 1)
    target = lam[:, None] * major.clamp(max=1) + (1 - lam[:, None]) * minor.clamp(max=1)
    losses = -target * (same + 1e-7).log() - (1 - target) * (1 - same + 1e-7).log()
    return (losses * _compared(losses, valid)).mean()


def _compared(pairs: Tensor, valid: Tensor | None) -> Tensor:
    """Return which pairs (V, M) are compared: those with a valid column (M,), except a view with itself."""
    other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return other if valid is None else other & valid


def selected_pairs(
    labels: tuple[Tensor, Tensor], features: tuple[Tensor, Tensor], selected: tuple[Tensor, Tensor], threshold: Tensor
) -> Tensor:
    """Return the pairs of samples with the same label that are both selected or similar enough.

    Source: Sel-CL (Li et al., CVPR 2022), Section 3.2.

    Args:
        labels: labels of rows (B,) and columns (M,).
        features: normalized embeddings of rows (B, P) and columns (M, P).
        selected: whether rows (B,) and columns (M,) are selected, bool.
        threshold: smallest cosine similarity of other pairs, a scalar.

    Returns:
        Shape (B, M), bool.
    """
    same = labels[0][:, None] == labels[1]
    similar = features[0] @ features[1].T >= threshold
    return same & (similar | (selected[0][:, None] & selected[1]))
