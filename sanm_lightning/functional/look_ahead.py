"""Look-ahead: a network after a gradient step that has not been taken, for objectives on the result of that step."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

__all__ = ["directional_derivative", "gradients", "lookahead", "network_at", "trainable"]


def trainable(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a network that require a gradient, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def gradients(loss: Tensor, parameters: Mapping[str, Tensor], second_order: bool = False) -> dict[str, Tensor]:
    """Return the gradients of a loss by the name of the parameter; the graph of the loss is kept.

    Gradients of parameters are returned, not accumulated, so that ``DistributedDataParallel`` does not average them.

    Args:
        loss: a scalar.
        parameters: parameters by name; those on which the loss does not depend have gradient 0.
        second_order: whether the gradients have a graph, so that they can be differentiated again.
    """
    found = torch.autograd.grad(
        loss, tuple(parameters.values()), create_graph=second_order, retain_graph=True, allow_unused=True
    )
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(value) if part is None else part for (name, value), part in pairs}


def lookahead(parameters: Mapping[str, Tensor], steps: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
    """Return the parameters after a step of gradient descent, without changing them: parameter - lr * step."""
    return {name: parameter - lr * steps[name] for name, parameter in parameters.items()}


def network_at(network: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits (B, C) of a network with other parameters, with gradient with respect to these parameters.

    In training mode, batch norm uses batch statistics. Its running statistics are not changed.

    Args:
        network: classifier of images.
        parameters: parameters by name, see :func:`trainable`; the others are those of the network.
        images: shape (B, C, H, W).
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits: Tensor = functional_call(network, {**parameters, **buffers}, (images,))
    return logits


def directional_derivative(
    network: nn.Module, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the logits of a network and their derivative along a direction in the space of its parameters.

    Forward-mode differentiation: the derivative is exact, and no graph is kept. The pass has full precision.

    Args:
        network: classifier of images.
        parameters: parameters by name.
        direction: direction by the name of the parameter.
        images: shape (B, C, H, W).

    Returns:
        Logits and derivatives, each (B, C), float32, without gradient.
    """
    at = {name: parameter.detach() for name, parameter in parameters.items()}
    with torch.autocast(images.device.type, enabled=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")  # torch's own call, in the first use
        found: Any = jvp(lambda moved: network_at(network, moved, images), (at,), (dict(direction),))
    logits, slopes = found
    return logits.float(), slopes.float()
