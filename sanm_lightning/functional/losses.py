"""Losses of the methods from logits; without reduction if a method weights or selects samples."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "clamped_probs",
    "clipped_gradient_term",
    "early_learning_regularization",
    "entropy",
    "feature_consistency",
    "forward_kl",
    "generalized_cross_entropy",
    "label_margin",
    "masked_mean",
    "mixmatch_loss",
    "negative_entropy",
    "nt_xent",
    "prior_kl",
    "reverse_kl",
    "soft_cross_entropy",
    "squared_error",
    "truncated_generalized_cross_entropy",
    "zero_term",
]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, logits (B, C), class probabilities (B, C) -> (B,) float32, >= 0."""
    return -(targets.float() * logits.float().log_softmax(1)).sum(1)


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Return the generalized cross-entropy of each sample, between cross-entropy (q -> 0) and absolute error (q = 1).

    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 6: (1 - p_y^q) / q, here with the expectation of p^q over soft targets.
    The power is computed from the log-probability, so that the gradient is finite as p_y approaches 0.

    Args:
        logits: shape (B, C).
        targets: class probabilities, shape (B, C).
        q: in (0, 1].

    Returns:
        Shape (B,), float32, in [0, 1 / q].

    Raises:
        ValueError: if ``q`` is out of its range.
    """
    if not 0 < q <= 1:
        raise ValueError(f"expected q in (0, 1], got {q}; use cross-entropy for q = 0")
    powers = (q * logits.float().log_softmax(1)).exp()
    return (targets.float() * (1 - powers)).sum(1) / q


def truncated_generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float, k: float, kept: Tensor) -> Tensor:
    """Return the truncated generalized cross-entropy of each sample: L_q - L_q(k) of kept samples, 0 of the others.

    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 11, with a weight of 0 or 1 for each sample. Samples are kept if their
    probability of the label is above k.

    Args:
        logits: shape (B, C).
        targets: class probabilities, shape (B, C).
        q: in (0, 1].
        k: threshold of the probability, in (0, 1).
        kept: whether each sample is kept, shape (B,), bool.

    Returns:
        Shape (B,), float32.
    """
    bound: float = (1 - k**q) / q
    return kept.float() * (generalized_cross_entropy(logits, targets, q) - bound)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each prediction, logits (B, C) -> (B,) float32, in [0, log C]."""
    log_probs = logits.float().log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1)


def reverse_kl(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the KL divergence of the prediction from the target, KL(p || t), logits (B, C), targets (B, C) -> (B,), >= 0.

    Targets of 0 are replaced by 1e-12.
    """
    log_probs = logits.float().log_softmax(1)
    return (log_probs.exp() * (log_probs - targets.float().clamp(min=1e-12).log())).sum(1)


def forward_kl(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the KL divergence of the target from the prediction, KL(t || p), logits (B, C), targets (B, C) -> (B,), >= 0."""
    targets = targets.float()
    return (torch.xlogy(targets, targets) - targets * logits.float().log_softmax(1)).sum(1)


def masked_mean(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean of ``values`` (B,), a scalar; 0 if all weights are 0.

    Args:
        values: shape (B,).
        weight: shape (B,), non-negative or bool; None weights all values equally.

    Returns:
        A scalar.
    """
    if weight is None:
        return values.mean()
    weight = weight.to(values.dtype)
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def zero_term(parameters: Iterable[Tensor]) -> Tensor:
    """Return 0 as a function of parameters that a step may not use, as DistributedDataParallel requires; a scalar.

    Args:
        parameters: one or more parameters; those without gradient are left out.
    """
    return 0.0 * torch.stack([parameter.sum() for parameter in parameters if parameter.requires_grad]).sum()


def clipped_gradient_term(loss: Tensor, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Return a term with the value of a loss, whose gradient is that of the loss with a norm of at most ``max_norm``.

    It takes a backward pass of the loss, and keeps the graph.

    Args:
        loss: a scalar.
        parameters: parameters with respect to which the gradient is clipped.
        max_norm: largest norm, positive; None returns the loss.

    Returns:
        A scalar; with ``max_norm``, its gradient is not differentiable again.
    """
    if max_norm is None:
        return loss
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    found = [(parameter, grad) for parameter, grad in zip(wanted, gradients, strict=True) if grad is not None]
    norm = torch.stack([grad.norm() for _, grad in found]).norm()
    scale = (max_norm / norm.clamp(min=1e-12)).clamp(max=1)
    linear = torch.stack([(parameter * (scale * grad).detach()).sum() for parameter, grad in found]).sum()
    return loss.detach() + linear - linear.detach()


def label_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the largest other logit minus that of the label, logits (B, C), targets (B, C) -> (B,) float32.

    Source: Pleiss et al., NeurIPS 2020, "area under the margin", with the opposite sign, so that it is ordered like
    a loss.
    """
    logits = logits.float()
    label = targets.argmax(1, keepdim=True)
    others = logits.scatter(1, label, float("-inf"))
    return others.amax(1) - logits.gather(1, label).squeeze(1)


def negative_entropy(logits: Tensor) -> Tensor:
    """Return the mean of sum p log p over a batch of logits (B, C): a scalar <= 0, smallest for uniform predictions."""
    log_probs = logits.float().log_softmax(1)
    return (log_probs.exp() * log_probs).sum(1).mean()


def prior_kl(logits: Tensor, prior: Tensor | None = None) -> Tensor:
    """Return the KL divergence of a batch's mean prediction from a class prior, KL(prior || mean): a scalar >= 0.

    Args:
        logits: shape (B, C).
        prior: class probabilities, shape (C,), positive; None is the uniform prior.
    """
    mean = logits.float().softmax(1).mean(0).clamp(min=1e-12)
    if prior is None:
        prior = torch.full_like(mean, 1 / logits.shape[1])
    divergence: Tensor = (prior * (prior.log() - mean.log())).sum()
    return divergence


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of each prediction, averaged over classes, logits (B, C), targets (B, C) -> (B,), >= 0."""
    return (logits.float().softmax(1) - targets).square().mean(1)


def mixmatch_loss(logits: Tensor, targets: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of DivideMix's Eq. 8 and 9: cross-entropy of labeled rows, squared error of the others.

    Source: Li et al., ICLR 2020.

    Args:
        logits: logits of mixed images, shape (V, C).
        targets: mixed targets, shape (V, C).
        labelled: whether a row is from the labeled set, shape (V,), bool.

    Returns:
        Two scalars: the mean cross-entropy, and the squared error, averaged over rows and classes. 0 without rows.
    """
    supervised = masked_mean(soft_cross_entropy(logits, targets), labelled)
    return supervised, masked_mean(squared_error(logits, targets), ~labelled)


def clamped_probs(logits: Tensor) -> Tensor:
    """Return probabilities (B, C), float32, clamped to [1e-4, 1 - 1e-4], so that log(1 - <t, p>) is finite."""
    return logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)


def early_learning_regularization(probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of log(1 - <t, p>), p (B, C) with gradient, targets t (B, C) without: a scalar <= 0.

    Source: Liu et al., NeurIPS 2020, Eq. 6. The value is negative and unbounded as p approaches t.
    """
    return (1 - (probs * targets.detach()).sum(1)).log().mean()


def nt_xent(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return the normalized temperature-scaled cross-entropy of 2 B views, whose positive pairs are views of one image.

    Source: Chen et al., ICML 2020, Eq. 1.

    Args:
        one: projections of the first views, shape (B, P).
        other: projections of the second views of the same images, shape (B, P).
        temperature: temperature, positive.

    Returns:
        A scalar, the mean over all 2 B views.
    """
    views = F.normalize(torch.cat([one, other]).float(), dim=1)
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), float("-inf"))
    partner = torch.arange(len(views), device=views.device).roll(len(one))
    return F.cross_entropy(similarity, partner)


def feature_consistency(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the negative mean cosine similarity of predictions and detached targets, (B, P): a scalar in [-1, 1]."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=1).mean()
