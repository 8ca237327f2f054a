"""Out-of-fold predictions from fixed features: linear probe and nearest-neighbor vote."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["WEIGHT_DECAYS", "ProbeResult", "assign_folds", "linear_probe", "log_loss", "neighbor_probs", "standardize"]

WEIGHT_DECAYS = (5.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.01)
"""Candidates in the order of the search, strong to weak."""
ROWS = 8192
"""Number of feature rows per matrix product."""
MAX_ITERATIONS = 100

Array = np.ndarray[Any, Any]


class ProbeResult(NamedTuple):
    """Out-of-fold predictions of N samples.

    Attributes:
        probs: class probabilities, shape (N, C), float32.
        weight_decay: weight decay with the lowest out-of-fold log-loss on the given labels.
        log_losses: out-of-fold log-loss by weight decay, of the search on all samples.
    """

    probs: Array
    weight_decay: float
    log_losses: dict[float, float]


def standardize(features: Array, rows: Array) -> Array:
    """Scale features (N, D), float32, to mean 0 and variance 1 over ``rows``; constant features become 0."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for part in np.array_split(rows, max(1, len(rows) // 4096)):  # no copy of the whole set in double precision
        block = np.asarray(features[part], np.float64)
        total, squares = total + block.sum(0), squares + np.square(block).sum(0)
    mean = total / len(rows)
    std = np.sqrt(np.maximum(squares / len(rows) - np.square(mean), 0))
    scale = np.divide(1.0, std, out=np.zeros_like(std), where=std > 1e-6 * (np.abs(mean) + 1e-6))
    out = np.empty(features.shape, np.float32)
    for start in range(0, len(features), 4096):
        out[start : start + 4096] = (features[start : start + 4096] - mean) * scale
    return out


def assign_folds(labels: Array, groups: Array, num_folds: int, seed: int) -> Array:
    """Assign samples to folds, stratified by class; the samples of a group are assigned to the same fold.

    Copies of an image in different folds would support each other's wrong label.

    Args:
        labels: shape (N,).
        groups: shape (N,), equal for copies of one image.
        num_folds: number of folds.
        seed: random seed.

    Returns:
        Fold of each sample, shape (N,), in [0, num_folds).
    """
    first, member = np.unique(groups, return_index=True, return_inverse=True)[1:]
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]  # class by class, in random order within each
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % num_folds
    return fold[member.reshape(-1)]


def log_loss(probs: Array, labels: Array) -> float:
    """Return the mean negative log-probability of labels (N,) under probabilities (N, C)."""
    return float(-np.log(np.maximum(probs[np.arange(len(labels)), labels], 1e-12)).mean())


def linear_probe(
    features: Array,
    labels: Array,
    folds: Array,
    num_classes: int,
    learn: Array | None = None,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    selection_size: int = 10_000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    overwrite_features: bool = False,
) -> ProbeResult:
    """Predict each sample by multinomial logistic regression on the samples of the other folds.

    The objective is the mean cross-entropy plus ``weight_decay`` times the sum of the squared weights. The weight decay
    with the lowest out-of-fold log-loss on the given labels is selected, which requires no true labels. For large sets,
    the search begins on a random subset and continues, towards weaker decays, on all samples: more samples require less.

    Args:
        features: shape (N, D), standardized, float32.
        labels: given labels, shape (N,), in [0, C).
        folds: shape (N,), from :func:`assign_folds`.
        num_classes: C, number of classes.
        learn: mask of the samples used for fitting, such as the training split, shape (N,), bool; None uses all
            samples. All samples are predicted.
        weight_decays: candidates, strong to weak. The first search stops after two consecutive candidates worse than the
            best, the second one after one.
        selection_size: maximum number of samples of the first search.
        seed: random seed of the subset.
        device: device used for fitting.
        overwrite_features: whether ``features`` may be used as working memory instead of a copy, which destroys them.
    """
    learn = np.ones(len(labels), bool) if learn is None else learn
    rows = np.flatnonzero(learn)
    if len(rows) > selection_size:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:selection_size])
    num_folds = int(folds.max()) + 1
    every = np.ones(len(rows), bool)
    subset = features[rows]  # a copy
    small = _Regressions(subset, labels[rows], folds[rows], num_folds, num_classes, every, device, overwrite=True)
    found, weights = _search(small, weight_decays, labels[rows], every, patience=2)
    if len(rows) == len(labels):
        return found
    del small, subset
    whole = _Regressions(features, labels, folds, num_folds, num_classes, learn, device, weights, overwrite_features)
    weaker = (
        weight_decays[weight_decays.index(found.weight_decay) :] if len(rows) < learn.sum() else [found.weight_decay]
    )
    return _search(whole, weaker, labels, learn, patience=1)[0]


def _search(
    regressions: "_Regressions", decays: Sequence[float], labels: Array, learn: Array, patience: int
) -> tuple[ProbeResult, Tensor]:
    """Fit weight decays in order until ``patience`` in a row are worse than the best; return its result and weights."""
    losses: dict[float, float] = {}
    for decay in decays:
        lowest = min(losses.values(), default=math.inf)
        probs = regressions.fit(decay).probs()
        losses[decay] = log_loss(probs[learn], labels[learn])
        if not losses[decay] >= lowest:  # also for NaN
            best, weights = ProbeResult(probs, decay, losses), regressions.unrotated()
        elif min(list(losses.values())[-patience:]) > lowest:
            break
    return best, weights


class _Regressions:
    """One regression per fold, fitted jointly by L-BFGS in the eigenbasis of the features.

    The product of the features with the weights of all folds takes little longer than with those of one fold, because
    it is limited by reading the features. Each direction is scaled by the square root of its curvature, for equal
    convergence rates.
    """

    def __init__(
        self,
        features: Array,
        labels: Array,
        folds: Array,
        num_folds: int,
        num_classes: int,
        learn: Array,
        device: Any,
        start: Tensor | None = None,
        overwrite: bool = False,
    ) -> None:
        self.labels, self.folds = torch.from_numpy(labels).to(device), torch.from_numpy(folds).to(device)
        self.num_folds, self.num_classes = num_folds, num_classes
        learn_rows = torch.from_numpy(learn).to(device)
        self.used = (self.folds.unsqueeze(1) != torch.arange(self.num_folds, device=device)) & learn_rows.unsqueeze(1)
        self.counts = self.used.sum(0).clamp(min=1)
        table = torch.from_numpy(features).to(device)
        gram = torch.zeros(table.shape[1], table.shape[1], device=device)
        for rows in table.split(ROWS):
            gram.addmm_(rows.T, rows)
        gram /= len(table)
        try:
            curvature, self.basis = torch.linalg.eigh(gram)
        except torch.linalg.LinAlgError:  # of many constant features, in single precision
            curvature, self.basis = (part.float() for part in torch.linalg.eigh(gram.double()))
        self.curvature = curvature.clamp(min=0)
        self.rotated = table if overwrite else torch.empty_like(table)
        for rows, rotated in zip(table.split(ROWS), self.rotated.split(ROWS), strict=True):
            rotated.copy_(rows @ self.basis)
        shape = (table.shape[1] + 1, self.num_folds, num_classes)
        self.weights = torch.zeros(shape, device=device)  # in the rotated basis; the last row is the bias
        if start is not None:
            self.weights = self._turned(self.basis.T, start)

    @staticmethod
    def _turned(basis: Tensor, weights: Tensor) -> Tensor:
        return torch.cat([(basis @ weights[:-1].flatten(1)).view_as(weights[:-1]), weights[-1:]])

    def unrotated(self) -> Tensor:
        """Return the weights for the features as they are, (D + 1, folds, C); the last row is the bias."""
        return self._turned(self.basis, self.weights)

    def fit(self, decay: float) -> "_Regressions":
        """Minimize the objective for one weight decay, starting from the current weights."""
        scale = (0.25 * self.curvature + 2 * decay).rsqrt()
        scale = torch.cat([scale, scale.new_full((1,), 2.0)]).view(-1, 1, 1)
        point = (self.weights / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point], max_iter=MAX_ITERATIONS, tolerance_grad=0, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            weights = point.detach() * scale
            loss, gradient = self._objective(weights, decay)
            point.grad = gradient * scale
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.weights = point.detach() * scale
        return self

    def _objective(self, weights: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """Return the sum of the objectives of all folds and its gradient."""
        penalized = weights[:-1]
        loss = decay * penalized.square().sum()
        gradient = torch.cat([2 * decay * penalized, torch.zeros_like(weights[-1:])])
        flat = weights.flatten(1)
        for start in range(0, len(self.rotated), ROWS):
            part = slice(start, start + ROWS)
            rows, used = self.rotated[part], self.used[part] / self.counts
            log_probs = (rows @ flat[:-1] + flat[-1]).view(len(rows), *weights.shape[1:]).log_softmax(2)
            place = self.labels[part].view(-1, 1, 1).expand(-1, self.num_folds, 1)
            loss = loss - (log_probs.gather(2, place).squeeze(2) * used).sum()
            residual = log_probs.exp_()
            residual.scatter_add_(2, place, residual.new_full((1, 1, 1), -1.0).expand_as(place))
            residual = residual.mul_(used.unsqueeze(2)).flatten(1)
            gradient[:-1] += (rows.T @ residual).view_as(penalized)
            gradient[-1] += residual.sum(0).view_as(gradient[-1])
        return loss, gradient

    def probs(self) -> Array:
        """Return the prediction of each sample by the regression of the other folds, shape (N, C)."""
        found = torch.empty(len(self.rotated), self.num_classes)
        flat = self.weights.flatten(1)
        for start in range(0, len(self.rotated), ROWS):
            part = slice(start, start + ROWS)
            logits = (self.rotated[part] @ flat[:-1] + flat[-1]).view(-1, *self.weights.shape[1:])
            place = self.folds[part].view(-1, 1, 1).expand(-1, 1, self.num_classes)
            found[part] = logits.gather(1, place).squeeze(1).softmax(1).cpu()
        return found.numpy()


def neighbor_probs(
    neighbors: Array,
    similarity: Array,
    labels: Array,
    num_classes: int,
    prior: Array | None = None,
    prior_weight: float = 1.0,
) -> Array:
    """Compute class probabilities from the given labels of neighbors, with the class frequencies as prior.

    Args:
        neighbors: positions of the neighbors, shape (N, k); negative positions are ignored.
        similarity: weight of each neighbor, shape (N, k), non-negative.
        labels: given labels of all positions, shape (M,).
        num_classes: C, number of classes.
        prior: class frequencies, shape (C,); None uses those of ``labels``.
        prior_weight: weight of the prior, in units of neighbors.

    Returns:
        Shape (N, C), float32.
    """
    prior = np.bincount(labels, minlength=num_classes) / len(labels) if prior is None else prior
    votes = np.tile((prior_weight * prior).astype(np.float32), (len(neighbors), 1))
    for column, weight in zip(neighbors.T, similarity.T, strict=True):
        seen = column >= 0
        np.add.at(votes, (np.flatnonzero(seen), labels[column[seen]]), weight[seen])
    normalized: Array = votes / votes.sum(1, keepdims=True)
    return normalized
