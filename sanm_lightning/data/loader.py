"""A resumable loader of sample indices."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.rows import Row, RowRequest, SplitItem
from sanm_lightning.random_streams import named_generator

__all__ = ["IndexLoader"]


class IndexLoader:
    """Loader of batches of sample indices, shuffled by seed and epoch, sharded over processes, resumable in mid-epoch.

    With ``shuffle`` (training), the order of an epoch is a permutation from (seed, epoch), the same in every process;
    process r of R takes every R-th sample from position r. If N is not a multiple of R, the permutation is extended
    from its beginning, so that all processes have the same number of batches. A last batch of a single sample is
    dropped, because batch normalization cannot train on it, and the last partial batch is dropped with ``drop_last``; a
    set smaller than one batch is never dropped.

    Without ``shuffle`` (evaluation), every sample is served exactly once over all processes, in order. The numbers of
    samples per process may differ by one; every process has the same number of batches (some one sample smaller, or,
    for batches of one sample, larger), because a process with an additional batch would deadlock.

    As in Lightning's protocol for stateful loaders, ``state_dict`` contains the epoch and the number of batches served;
    after ``load_state_dict``, the next iteration serves the rest of that epoch, and later iterations whole epochs. The
    global random streams are not used.

    Args:
        num_samples: N, 1 or more.
        batch_size: samples per batch and process.
        shuffle: whether this is a training loader.
        seed: seed of the order, 0 or more.
        rank: rank of this process.
        world_size: number of processes.
        drop_last: whether to drop the last partial batch; only with ``shuffle``.
        store: images that are decoded by workers.
        decode: function that returns whether an epoch requires the store; None: always.
        fixed_order: use the same pool and permutation in every epoch, as required by ``overfit_batches``.
        pool: function that returns the positions (M,) that an epoch samples from; None uses all.
        choose: function of the epoch, called before its first batch, that prepares the epoch and returns its batches:
            positions (S, B) of this process, S = ``len(self)``, or None for shuffled batches.
        request: function that creates the request to a worker from epoch, step and indices. Default: images only.
        split: name of the split, for loaders of a data module.

    Yields:
        Indices, shape (B,), int64; with a store, a :class:`Row`; with a split, a :class:`SplitItem` of one of them. On the
        CPU.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        store: ImageStore | None = None,
        decode: Callable[[], bool] | None = None,
        fixed_order: bool = False,
        pool: Callable[[int], Tensor] | None = None,
        choose: Callable[[int], Tensor | None] | None = None,
        request: Callable[[int, int, Tensor], RowRequest] | None = None,
        split: str | None = None,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"expected a {name} of 1 or more, got {value}; choose a larger one")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank in 0 to {world_size - 1}, got {rank}; number the processes from 0")
        if seed < 0:
            raise ValueError(f"expected a seed of 0 or more, got {seed}; choose another, such as 0")
        if not shuffle and num_samples < world_size:
            raise ValueError(
                f"expected at least one sample for each of {world_size} processes, got {num_samples}; use at most "
                f"{num_samples} processes"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.fixed_order = fixed_order
        self.split = split
        self._pool, self._choose = pool, choose
        self._request = request or (lambda epoch, step, index: RowRequest(index))
        # Not named `dataset`: Lightning rebuilds any loader with that attribute.
        self._store, self._decode = store, decode or (lambda: True)
        self._epoch = 0
        self._served = 0  # batches of this epoch that have been yielded
        self._skip = 0  # batches that the next iteration skips, after a resume

    batch_sampler = None
    """None: Lightning reads this attribute from every loader with a sampler."""

    @property
    def sampler(self) -> "IndexLoader":
        """This loader: Lightning calls ``loader.sampler.set_epoch`` before every epoch."""
        return self

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and number within the epoch, from 0, of the last served batch (-1 before the first one)."""
        return self._epoch, self._served - 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; the position within the epoch is kept if the epoch is unchanged."""
        if epoch != self._epoch:
            self._epoch, self._served, self._skip = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of served batches, the same in every process."""
        return {
            "epoch": self._epoch,
            "batches": self._served,
            "of": len(self),
            "num_samples": self.num_samples,
            "batch_size": self.batch_size,
            "processes": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position: the next iteration serves the rest of the epoch.

        Raises:
            ValueError: if the state is not that of an IndexLoader, or is from mid-epoch with another batch size,
                number of processes or number of samples, for which no position has the same preceding samples.
        """
        if not {"epoch", "batches"} <= state.keys():
            raise ValueError(
                f"expected a loader state with 'epoch' and 'batches', got {sorted(state)}; resume from a checkpoint "
                "written with this loader"
            )
        now = (self.batch_size, self.world_size, self.num_samples)
        before = tuple(map(state.get, ("batch_size", "processes", "num_samples"), now))
        if 0 < state["batches"] < state.get("of", len(self)) and before != now:
            raise ValueError(
                "expected the values of the checkpoint from the middle of an epoch, a batch size of "
                f"{before[0]} on {before[1]} processes and {before[2]} samples, got {now[0]} on {now[1]} and {now[2]}; use "
                "the same values, or a checkpoint from the end of an epoch"
            )
        self._epoch, self._served = int(state["epoch"]), int(state["batches"])
        self._skip = self._served

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch of this process, also after a resume."""
        samples = math.ceil(self.num_samples / self.world_size)
        batches = math.ceil(samples / self.batch_size)
        if not self.shuffle:
            return min(batches, self.num_samples // self.world_size)
        last = samples - (batches - 1) * self.batch_size
        too_small = last == 1 < self.batch_size or (self.drop_last and last < self.batch_size)
        return batches - 1 if too_small and batches > 1 else batches

    def __iter__(self) -> Iterator[Tensor | Row | SplitItem]:
        # A generator, which runs from the first `next` on: Lightning creates the first iterator before set_epoch.
        chosen = self._choose(self._epoch) if self._choose is not None else None
        batches = self._batches() if chosen is None else self._checked(chosen)
        first, self._served, self._skip = self._skip, self._skip, 0
        decoded = self._store is not None and self._decode()
        for batch in self._decoded(batches, first) if decoded else batches[first:]:
            self._served += 1
            yield batch if self.split is None else SplitItem(batch, self.split, self._stream())

    def _stream(self) -> tuple[int, ...]:
        """Return the numbers that identify the random streams of the last served batch; empty in evaluation."""
        return (self.seed, self.rank, *self.position) if self.shuffle else ()

    def _decoded(self, batches: list[Tensor], first: int) -> Iterator[Row]:
        assert self._store is not None
        requests = [self._request(self._epoch, step, index) for step, index in enumerate(batches)]
        return self._store.decode(requests[first:], self.seed)

    def _checked(self, chosen: Tensor) -> list[Tensor]:
        """Return the batches chosen by a method, after a check."""
        if chosen.ndim != 2 or len(chosen) != len(self) or chosen.shape[1] < 1 or chosen.dtype != torch.int64:
            raise ValueError(
                f"expected batches ({len(self)}, B) of int64 positions, one row per step, got {tuple(chosen.shape)} of "
                f"{chosen.dtype}; the number of steps is the same in every epoch, so repeat samples to fill them"
            )
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0:
            raise ValueError(f"expected positions of 0 or more in the batches of an epoch, got {low} to {high}")
        return list(chosen.cpu())

    def _batches(self) -> list[Tensor]:
        """Return the index batches of a whole epoch of this process."""
        epoch = 0 if self.fixed_order else self._epoch
        pool = torch.arange(self.num_samples) if self._pool is None else self._pool(epoch)
        if not self.shuffle:
            own = pool[self.rank :: self.world_size]
            if math.ceil(len(own) / self.batch_size) != len(self):
                return list(own.tensor_split(len(self)))
            return list(torch.split(own, self.batch_size))
        generator = named_generator("order", self.seed, epoch)
        order = torch.randperm(len(pool), generator=generator)
        padded = self.num_samples + -self.num_samples % self.world_size
        order = pool[order[torch.arange(padded) % len(pool)]]
        return list(torch.split(order[self.rank :: self.world_size], self.batch_size))[: len(self)]
