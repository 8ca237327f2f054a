"""Gradients of a loss on known labels with respect to weights and labels of training samples (IEG)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.functional.look_ahead import (
    directional_derivative,
    gradients,
    lookahead,
    network_at,
    trainable,
)
from sanm_lightning.functional.losses import soft_cross_entropy
from sanm_lightning.functional.targets import co_refine

__all__ = ["LookaheadStep", "meta_gradients", "meta_weights", "reweighted_cross_entropy", "sgd_step"]


class LookaheadStep(NamedTuple):
    """The optimizer step that is looked ahead to.

    Attributes:
        lr: step size.
        pull: parts of the step beside the gradient of the loss, by the name of the parameter: weight decay and momentum.
        weight_decay: weight decay, which is part of the loss on the known labels.
    """

    lr: float
    pull: Mapping[str, Tensor] = {}
    weight_decay: float = 0.0


def sgd_step(
    network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], lr: float, momentum: float
) -> LookaheadStep:
    """Return a step with the weight decay and the momentum of ``torch.optim.SGD``; of other optimizers, neither.

    Args:
        network: the network.
        optimizers: optimizers of the network.
        lr: step size.
        momentum: factor of the momentum that the optimizer has accumulated.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    pull, decay = {}, 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
            decay = float(group["weight_decay"])
            for parameter in (part for part in group["params"] if part in names):
                gathered = optimizer.state.get(parameter, {}).get("momentum_buffer")
                part = decay * parameter.detach()
                pull[names[parameter]] = part if gathered is None else part + momentum * gathered
    return LookaheadStep(lr, pull, decay)


def meta_gradients(
    network: nn.Module,
    images: Tensor,
    logits: Tensor,
    labels: Tensor,
    guesses: Tensor,
    probe_images: Tensor,
    probe_labels: Tensor,
    trust: float,
    step: LookaheadStep,
    second_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the probe loss after a step with respect to each sample's weight and trust in its label.

    Source: IEG (Zhang et al., CVPR 2020), and its code. The step uses the loss sum_i w_i H(e_i y_i + (1 - e_i) g_i, p_i) at
    w_i = 1 / B and e_i = ``trust``.

    Args:
        network: classifier of images.
        images: shape (B, C, H, W).
        logits: logits of ``images`` from the training pass, shape (B, C), with a graph, which is kept.
        labels: given labels as one-hot rows, shape (B, C).
        guesses: guessed labels, class probabilities, shape (B, C), without gradient.
        probe_images: images with known labels, shape (P, C, H, W).
        probe_labels: known labels, class indices, shape (P,).
        trust: e_i, weight of the given labels in the step, in [0, 1].
        step: the optimizer step.
        second_order: whether to differentiate the step itself by a second backward pass, as in the code, instead of the
            logits along the gradient of the probe loss, by a forward pass. The results are equal; the second backward pass
            costs more time and memory, and not all operations support it.

    Returns:
        Gradients with respect to w and e, each (B,), float32, without graph.
    """
    parameters = trainable(network)
    weights = torch.full_like(labels[:, 0], 1 / len(labels), requires_grad=second_order)
    trusts = torch.full_like(labels[:, 0], trust, requires_grad=second_order)
    loss = (weights * soft_cross_entropy(logits, co_refine(labels, trusts, guesses))).sum()
    found = gradients(loss, parameters, second_order)
    steps = {name: part + step.pull[name] if name in step.pull else part for name, part in found.items()}
    ahead = lookahead({name: value.detach() for name, value in parameters.items()}, steps, step.lr)
    if not second_order:
        ahead = {name: value.requires_grad_() for name, value in ahead.items()}
    probe_loss = F.cross_entropy(network_at(network, ahead, probe_images).float(), probe_labels)
    if step.weight_decay:
        squares = torch.stack([value.square().sum() for value in ahead.values()])
        probe_loss = probe_loss + step.weight_decay / 2 * squares.sum()
    if second_order:
        by_weight, by_trust = torch.autograd.grad(probe_loss, (weights, trusts), retain_graph=True)
        return by_weight, by_trust
    direction = gradients(probe_loss, ahead)
    at, slopes = directional_derivative(network, parameters, direction, images)
    with torch.no_grad():
        # the derivative of H(t, p) along the direction is <p - t, slopes>
        by_label, by_guess = (((at.softmax(1) - target) * slopes).sum(1) for target in (labels, guesses))
        return -step.lr * (trust * by_label + (1 - trust) * by_guess), -step.lr / len(labels) * (by_label - by_guess)


def meta_weights(by_weight: Tensor) -> Tensor:
    """Return weights of samples from the gradients (B,) with respect to them: the negative ones, with sum 1 or less.

    Source: the code of IEG, which adds 1e-5 to the sum, so that weights are 0 if no gradient is negative.
    """
    useful = (-by_weight).clamp(min=0)
    return useful / (useful.sum() + 1e-5)


def reweighted_cross_entropy(
    logits: Tensor, labels: Tensor, guesses: Tensor, chosen: Tensor, weights: Tensor, trust: float
) -> Tensor:
    """Return the mean of two cross-entropies: of chosen labels with equal weights, and of mixed labels with given weights.

    Source: the code of IEG (Zhang et al., CVPR 2020).

    Args:
        logits: shape (B, C).
        labels: given labels as one-hot rows, shape (B, C).
        guesses: guessed labels, class probabilities, shape (B, C).
        chosen: 1 where the given label is used, 0 where the guessed one is, shape (B,).
        weights: weights for the labels ``trust`` y + (1 - ``trust``) g, shape (B,), see :func:`meta_weights`.
        trust: weight of the given against the guessed label in these, in [0, 1].

    Returns:
        A scalar.
    """
    chosen_losses = soft_cross_entropy(logits, co_refine(labels, chosen, guesses))
    mixed_losses = soft_cross_entropy(logits, trust * labels + (1 - trust) * guesses)
    return (chosen_losses.mean() + (weights * mixed_losses).sum()) / 2
