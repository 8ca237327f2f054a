"""Subsets of the training set that an epoch uses: random or class-balanced, sampled anew in every epoch."""

from abc import abstractmethod

import torch
from torch import Tensor

from sanm_lightning.data.splits import Splits
from sanm_lightning.random_streams import named_generator

__all__ = ["EpochPools", "balanced_pool", "random_pool"]


def random_pool(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Sample ``count`` of the positions 0 to ``size`` - 1, (count,); more than ``size`` in repeated permutations."""
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count]


def balanced_pool(labels: Tensor, num_classes: int, count: int | None, generator: torch.Generator) -> Tensor:
    """Sample positions with equal numbers of all classes that have samples.

    Source: the balanced subsets of Clothing1M in the code of DivideMix (Li et al., ICLR 2020).
    Departure: classes that are smaller than their share are repeated, so that the size is exact.

    Args:
        labels: shape (N,), int64.
        num_classes: C.
        count: M, number of positions; if it is not a multiple of the number of classes, some classes have one more. None:
            the number of classes times the size of the smallest one.
        generator: random generator.

    Returns:
        Positions, shape (M,), sorted by class.
    """
    sizes = labels.bincount(minlength=num_classes)
    present = sizes.nonzero()[:, 0]
    count = len(present) * int(sizes[present].min()) if count is None else count
    share = torch.full((len(present),), count // len(present))
    share[torch.randperm(len(present), generator=generator)[: count % len(present)]] += 1
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)].split(sizes[present].tolist())
    return torch.cat(
        [
            members.repeat(-(-part // len(members)))[:part]
            for members, part in zip(by_class, share.tolist(), strict=True)
        ]
    )


class EpochPools(Splits):
    """The part of `NoisyDataModule` that chooses the samples of an epoch."""

    samples_per_epoch: int | None
    balanced: bool

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes."""

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """Given labels of the training split, shape (N,)."""

    def epoch_pool(self, epoch: int, peer: int = 0) -> Tensor:
        """Return the positions that an epoch samples from, (M,), the same in every process.

        All positions, or the subset of ``samples_per_epoch`` and ``balanced``. An override must have a constant size.
        Methods sample from the pool, and passes over the training set iterate over it.

        Args:
            epoch: epoch number, from 0.
            peer: number of the network, 0 or 1.

        Returns:
            Positions, shape (M,), int64.
        """
        if self.samples_per_epoch is None and not self.balanced:
            return torch.arange(self.num_samples)
        generator = named_generator("pool", self.seed, epoch, peer)
        if self.balanced:
            pool = balanced_pool(self.labels, self.num_classes, self.samples_per_epoch, generator)
            if self.samples_per_epoch is None:
                self._say(
                    f"balanced: an epoch has {len(pool)} of {self.num_samples} training samples, as many of each class as the "
                    "smallest one has; set samples_per_epoch to repeat these"
                )
            return pool
        return random_pool(self.num_samples, self.samples_per_epoch or self.num_samples, generator)

    def pass_pool(self) -> Tensor:
        """Return the positions of a pass over the training set: those of all networks' pools, sorted, each once."""
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        epoch = 0 if self.trainer is None or self._fixed_order else self.trainer.current_epoch
        pools = [self.epoch_pool(epoch, peer) for peer in range(getattr(module, "num_networks", 1))]
        positions: Tensor = torch.cat(pools).unique()
        return positions
