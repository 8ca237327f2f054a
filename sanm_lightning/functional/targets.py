"""Targets from labels and predictions, and mixup."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Mixed",
    "bootstrapped",
    "co_refine",
    "guessed_labels",
    "guided_mixup",
    "keep_given",
    "label_step",
    "mixup",
    "mixup_among",
    "neighbor_labels",
    "rms_normalize",
    "row_mixup",
    "sharpen",
]


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """Raise probabilities (B, C) to the power 1 / T and normalize them; T below 1 increases the confidence."""
    powered = probs ** (1 / temperature)
    return powered / powered.sum(1, keepdim=True)


def co_refine(targets: Tensor, quality: Tensor, prediction: Tensor) -> Tensor:
    """Mix given labels (B, C) with predictions (B, C), weighted by the probability (B,) that the label is correct."""
    w = quality.unsqueeze(1)
    return w * targets + (1 - w) * prediction


def bootstrapped(labels: Tensor, logits: Tensor, quality: Tensor, temperature: float | None = None) -> Tensor:
    """Mix given labels with the network's own predictions, weighted by label quality.

    Source: Reed et al., 2015, with the weights of each sample of Arazo et al., ICML 2019, Eq. 9 to 12.

    Args:
        labels: given labels as one-hot rows, shape (B, C).
        logits: logits of the predictions, shape (B, C).
        quality: probability that each given label is correct, shape (B,), in [0, 1].
        temperature: divisor of the logits (soft bootstrapping); None uses the predicted class (hard bootstrapping).

    Returns:
        Class probabilities, shape (B, C).
    """
    if temperature is None:
        return co_refine(labels, quality, F.one_hot(logits.argmax(1), logits.shape[1]).float())
    return co_refine(labels, quality, (logits / temperature).softmax(1))


class Mixed(NamedTuple):
    """Mixed batch, with the parameters to mix further tensors likewise."""

    images: Tensor
    """(V, 3, H, W)."""
    targets: Tensor
    """(V, C)."""
    lam: float | Tensor
    """Weight of the original rows, in [0, 1]; or one weight per row, shape (V,)."""
    partners: Tensor
    """(V,), position of the row that each row is mixed with."""

    def mix(self, rows: Tensor) -> Tensor:
        """Mix other rows (V, ...) with the same weight and partners."""
        lam = self.lam if isinstance(self.lam, float) else self.lam.view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
        return lam * rows + (1 - lam) * rows[self.partners]

    def of_samples(self, count: int) -> "Mixed":
        """Return how the first ``count`` rows are mixed with each other, if the V rows are copies of ``count`` samples."""
        return self._replace(partners=self.partners[:count] % count)


def mixup(images: Tensor, targets: Tensor, generator: torch.Generator, alpha: float, larger_half: bool = True) -> Mixed:
    """Mix each image and its target with those of a random other row, with one weight per batch.

    Source: Zhang et al., ICLR 2018.

    Args:
        images: shape (V, 3, H, W).
        targets: class probabilities, shape (V, C).
        generator: random generator, on the CPU.
        alpha: parameter of the weight's distribution Beta(alpha, alpha); 0 disables mixing.
        larger_half: whether to use the larger of lam and 1 - lam, as in MixMatch.

    Returns:
        The mixed batch, on the device of the images.

    Raises:
        ValueError: if alpha is negative.
    """
    lam = _drawn_weight(alpha, generator)
    lam = max(lam, 1 - lam) if larger_half else lam
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    mixed = Mixed(images, targets, lam, partners)
    return mixed if lam == 1 else mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


def mixup_among(images: Tensor, targets: Tensor, among: Tensor, generator: torch.Generator, alpha: float) -> Mixed:
    """Mix the rows of a subset with each other, and the other rows with each other, with one weight in [0, 1] per batch.

    Source: RRL (Li et al., ICCV 2021), which mixes confident samples.

    Args:
        images: shape (V, 3, H, W).
        targets: class probabilities, shape (V, C).
        among: the subset, shape (V,), bool; it is not read on the host.
        generator: random generator, on the CPU.
        alpha: parameter of the weight's distribution Beta(alpha, alpha); 0 disables mixing.

    Returns:
        The mixed batch, on the device of the images.

    Raises:
        ValueError: if alpha is negative.
    """
    lam = _drawn_weight(alpha, generator)
    keys = torch.rand(len(images), generator=generator).to(images.device, non_blocking=True)
    rows, shuffled = (~among).long().argsort(stable=True), (keys - 2 * among).argsort()  # the subset first, in both
    mixed = Mixed(images, targets, lam, torch.empty_like(rows).scatter_(0, rows, shuffled))
    return mixed if lam == 1 else mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


def _drawn_weight(alpha: float, generator: torch.Generator) -> float:
    if alpha < 0:
        raise ValueError(f"expected alpha >= 0, got {alpha}; use 0 to disable mixing")
    seed = int(torch.randint(2**62, (), generator=generator))  # torch's Beta does not support generators
    return float(np.random.default_rng(seed).beta(alpha, alpha)) if alpha > 0 else 1.0


def keep_given(targets: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Replace targets (N, C) by the one-hot row of the given label (N,) where its probability is above ``threshold``."""
    given = torch.nn.functional.one_hot(labels, targets.shape[1]).to(targets.dtype)
    return torch.where((targets * given).sum(1, keepdim=True) > threshold, given, targets)


def guided_mixup(
    images: Tensor, targets: Tensor, quality: Tensor, generator: torch.Generator, lam: float = 0.5
) -> Mixed:
    """Mix each image with a random other one, each weighted by its label quality, and the targets with one weight.

    Source: Arazo et al., ICML 2019, Section 3.3 (dynamic mixup).

    Args:
        images: shape (V, 3, H, W).
        targets: class probabilities, shape (V, C).
        quality: quality of each label, shape (B,), positive; V is B times the number of views, which follow one another.
        generator: random generator, on the CPU.
        lam: weight of each row's own target, in [0, 1].

    Returns:
        The mixed batch, on the device of the images; its :meth:`Mixed.mix` uses ``lam``.
    """
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    quality = quality.repeat(len(images) // max(1, len(quality)))
    own = (quality / (quality + quality[partners])).view(-1, 1, 1, 1).to(images.dtype)
    mixed = Mixed(images, targets, lam, partners)
    return mixed._replace(images=own * images + (1 - own) * images[partners], targets=mixed.mix(targets))


def label_step(logits: Tensor, prediction: Tensor, given: Tensor, alpha: float, twice: bool = False) -> Tensor:
    """Return the gradient of PENCIL's loss of each sample with respect to the logits of its label distribution d.

    Source: Yi and Wu, CVPR 2019, Eq. 2 to 5 and 8: KL(p || d) / C - alpha log d_y, as (d - p) / C + alpha (d - y).

    Args:
        logits: logits of d, shape (B, C).
        prediction: logits of the network's prediction p, shape (B, C).
        given: given labels as one-hot rows, shape (B, C).
        alpha: weight of the compatibility with the given label.
        twice: whether the compatibility applies a softmax to d once more, as in the authors' code.

    Returns:
        Shape (B, C), float32, without gradient; rows sum to 0.
    """
    with torch.no_grad():
        learned, predicted = logits.float().softmax(1), prediction.float().softmax(1)
        compatibility = learned - given
        if twice:
            outer = learned.softmax(1) - given
            compatibility = learned * (outer - (learned * outer).sum(1, keepdim=True))
        return (learned - predicted) / logits.shape[1] + alpha * compatibility


def row_mixup(images: Tensor, targets: Tensor, generator: torch.Generator, beta: float) -> Mixed:
    """Mix each image and its target with those of a random other row, with one weight per row.

    Source: the code of IEG (Zhang et al., CVPR 2020): the larger of m and 1 - m, with m = u^(1 / beta) / 2 and u ~ U(0, 1),
    an approximation of Beta(beta, beta).

    Args:
        images: shape (V, 3, H, W).
        targets: class probabilities, shape (V, C).
        generator: random generator, on the CPU.
        beta: parameter of the distribution, positive.

    Returns:
        The mixed batch, on the device of the images.
    """
    half = torch.rand(len(images), generator=generator) ** (1 / beta) / 2
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    mixed = Mixed(images, targets, (1 - half).to(images.device, non_blocking=True), partners)
    return mixed._replace(images=mixed.mix(images), targets=mixed.mix(targets))


def rms_normalize(logits: Tensor) -> Tensor:
    """Divide logits (B, C) by their root mean square over the batch, (B, C) float32 (the code of IEG)."""
    logits = logits.float()
    return logits * (logits.square().mean() + 1e-8).rsqrt()


@torch.no_grad()
def guessed_labels(views: Sequence[Tensor], temperature: float) -> Tensor:
    """Guess labels from several views of each sample: the sharpened mean of the predictions for logits of mean square 1.

    Source: the code of IEG (Zhang et al., CVPR 2020).

    Args:
        views: logits of each view, shape (B, C).
        temperature: temperature of :func:`sharpen`, positive.

    Returns:
        Class probabilities, shape (B, C), float32, without gradient.
    """
    predictions = (rms_normalize(logits).softmax(1) for logits in views)
    return sharpen(sum(predictions, torch.zeros_like(views[0])) / len(views), temperature)


def neighbor_labels(
    labels: Tensor, features: Tensor, copies: int, fraction: float, k: int, generator: torch.Generator | None
) -> Tensor:
    """Perturb the labels of a batch: a random part of the samples takes the label of a near neighbor in the batch.

    Source: MLNT (Li et al., CVPR 2019), Section 3.1. Neighbors have the smallest Euclidean distance of features; the sample
    itself is excluded by its position.

    Args:
        labels: shape (B,), int64.
        features: shape (B, D).
        copies: M, number of perturbed copies.
        fraction: fraction of the samples that are perturbed, in [0, 1], rounded down.
        k: number of neighbors, one of which is chosen; at most B - 1 are used.
        generator: random generator, on the CPU.

    Returns:
        Perturbed labels, shape (M, B), int64. A batch of one sample is not perturbed.
    """
    size = len(labels)
    k = min(k, size - 1)
    if k < 1:
        return labels.repeat(copies, 1)
    distance = torch.cdist(features.float(), features.float()).fill_diagonal_(float("inf"))
    neighbors = distance.topk(k, largest=False).indices  # (B, k)
    rank = torch.rand((copies, size), generator=generator).argsort(1).argsort(1)
    perturbed = (rank < int(fraction * size + 1e-6)).to(labels.device, non_blocking=True)
    choice = torch.randint(k, (copies, size), generator=generator).to(labels.device, non_blocking=True)
    chosen = neighbors.gather(1, choice.T).T  # (M, B)
    return torch.where(perturbed, labels[chosen], labels)
