"""Batches of an epoch from sets of training samples."""

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan
from sanm_lightning.functional import class_balanced_draw, members_by_class, repeated_draw

__all__ = ["balanced_batches", "permuted_batches", "selected_batches"]


def balanced_batches(
    plan: EpochPlan, members: Tensor, labels: Tensor, num_classes: int, size: int, generator: torch.Generator
) -> Tensor:
    """Sample the batches of this process from a set with replacement: first a class, then one of its members.

    Args:
        plan: number of steps.
        members: positions in the training set, shape (n,), n >= 1, on the CPU.
        labels: labels of the members, shape (n,), on the CPU.
        num_classes: C, number of classes; those without members are left out.
        size: samples per step.
        generator: random generator, on the CPU, with another seed in each process.

    Returns:
        Positions, shape (S, size).
    """
    by_class = members_by_class(members, labels, num_classes)
    return class_balanced_draw(*by_class, plan.steps * size, generator).view(plan.steps, size)


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


def selected_batches(plan: EpochPlan, selected: Tensor, generator: torch.Generator) -> Tensor:
    """Sample the batches of this process from repeated random permutations of the selected samples of the epoch's pool.

    Args:
        plan: numbers of steps and processes, batch size, and the pool.
        selected: whether each sample of the training set is selected, shape (N,), bool. All samples of the pool are used if
            none of them is.
        generator: as for :func:`permuted_batches`.

    Returns:
        Positions, shape (S, B).
    """
    pool = plan.pool(0)
    chosen = pool[selected.cpu()[pool]]
    return permuted_batches(plan, chosen if len(chosen) else pool, plan.step_size(pool), generator)
