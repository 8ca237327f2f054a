"""Batches of an epoch from sets of training samples."""

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan
from sanm_lightning.functional import repeated_draw

__all__ = ["permuted_batches"]


def permuted_batches(plan: EpochPlan, members: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Sample the batches of this process from repeated random permutations of a set.

    Args:
        plan: numbers of steps and processes.
        members: positions in the training set, shape (n,), n >= 1, on the CPU, the same in all processes.
        size: samples per step and process.
        generator: random generator, on the CPU, with the same seed in all processes.

    Returns:
        Positions, shape (S, size). All processes together visit every member once before any is repeated.
    """
    order = repeated_draw(members, plan.world_size * plan.steps * size, generator)
    return order[plan.rank :: plan.world_size].view(plan.steps, size)
