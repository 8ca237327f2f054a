"""A loader of sample indices that keeps its place."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.data.image_store import ImageStore, Row, RowRequest
from sanm_lightning.random_streams import named_generator

__all__ = ["IndexLoader"]


class IndexLoader:
    """Batches of sample indices, shuffled by seed and epoch, shared out over processes, resumable in mid-epoch.

    With ``shuffle`` (training) the order of an epoch is a permutation from (seed, epoch), the same in every process;
    process r of R takes every R-th sample from position r. The permutation is continued from its own start where N is
    not a multiple of R, so that all processes have the same number of batches. A last batch of one single sample is
    left out, because batch normalisation cannot train on it, and the last partial batch is left out where ``drop_last``
    is set; but a set that is smaller than one batch is always served.

    Without ``shuffle`` (evaluation) every sample is served exactly once over all processes, in order. Shares may then
    differ by one sample; they are cut into the same number of batches everywhere (some of them one sample smaller, or,
    for batches of one, larger), because a process that has one batch more than the others would wait for them for ever.

    As Lightning expects of a loader that can resume, ``state_dict`` holds the epoch and the batches already served, and
    after ``load_state_dict`` the next iteration serves the rest of that epoch; the iteration after it is whole again.
    Nothing is drawn from the global random streams.

    Args:
        num_samples: N, 1 or more.
        batch_size: samples per batch and process.
        shuffle: whether this is a training loader.
        seed: seed of the order, 0 or more.
        rank: number of this process.
        world_size: number of processes.
        drop_last: leave out the last partial batch; only with shuffle.
        store: images that are decoded by workers as they are needed.
        decode: whether an epoch needs the store; None: always.
        fixed_order: the same permutation in every epoch, as over-fitting on a few batches needs it.
        pool: gives the positions (M,) that an epoch draws from; None takes all.
        choose: called with the epoch before its first batch, to do the work of its beginning and to choose its batches:
            positions (S, B) of this process, S = ``len(self)``, or None for the shuffled ones.
        request: makes of a step and its indices what a worker is asked for; by default the images alone.

    Yields:
        Indices, shape (B,), int64; with a store, a :class:`Row`. On the CPU.

    Raises:
        ValueError: an argument is out of range.
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
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"expected a {name} of 1 or more, got {value}; choose a larger one")
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank in 0 to {world_size - 1}, got {rank}; ranks count the processes from 0")
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
        self._pool, self._choose = pool, choose
        self._request = request or (lambda epoch, step, index: RowRequest(index))
        # Not called `dataset`: Lightning takes anything with that attribute for a DataLoader that it may rebuild.
        self._store, self._decode = store, decode or (lambda: True)
        self._epoch = 0
        self._served = 0  # batches of this epoch that have been yielded
        self._skip = 0  # batches that the next iteration leaves out, after a resume

    batch_sampler = None
    """None: Lightning asks every loader that has a sampler for this."""

    @property
    def sampler(self) -> "IndexLoader":
        """This loader: Lightning calls ``loader.sampler.set_epoch`` before every epoch."""
        return self

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and the number within it, from 0, of the batch that was served last (-1 where none was)."""
        return self._epoch, self._served - 1

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration follows. The place in an epoch is kept while the epoch stays."""
        if epoch != self._epoch:
            self._epoch, self._served, self._skip = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches that have been served; the same in every process."""
        return {
            "epoch": self._epoch,
            "batches": self._served,
            "of": len(self),
            "batch_size": self.batch_size,
            "processes": self.world_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where the state was taken: the next iteration serves the rest of the epoch.

        Raises:
            ValueError: the state is not one of this loader, or was taken in mid-epoch with other batches: then no place in
                this loader's epoch has the same samples behind it.
        """
        if not {"epoch", "batches"} <= state.keys():
            raise ValueError(
                f"expected a loader state with 'epoch' and 'batches', got {sorted(state)}; resume from a checkpoint that was "
                "written with this loader"
            )
        before = state.get("batch_size", self.batch_size), state.get("processes", self.world_size)
        if 0 < state["batches"] < state.get("of", len(self)) and before != (self.batch_size, self.world_size):
            raise ValueError(
                f"expected a batch size of {before[0]} on {before[1]} processes, those of the checkpoint from the middle of an "
                f"epoch, got {self.batch_size} on {self.world_size}; give the same, or a checkpoint from an epoch's end"
            )
        self._epoch, self._served = int(state["epoch"]), int(state["batches"])
        self._skip = self._served

    def __len__(self) -> int:
        """Batches in a whole epoch of this process, also after a resume."""
        share = math.ceil(self.num_samples / self.world_size)
        batches = math.ceil(share / self.batch_size)
        if not self.shuffle:
            return min(batches, self.num_samples // self.world_size)
        last = share - (batches - 1) * self.batch_size
        too_small = last == 1 < self.batch_size or (self.drop_last and last < self.batch_size)
        return batches - 1 if too_small and batches > 1 else batches

    def __iter__(self) -> Iterator[Tensor | Row]:
        # A generator: nothing happens before the first batch is asked for. Lightning creates the first iterator before
        # it calls set_epoch.
        chosen = self._choose(self._epoch) if self._choose is not None else None
        batches = self._batches() if chosen is None else self._checked(chosen)
        first, self._served, self._skip = self._skip, self._skip, 0
        decoded = self._store is not None and self._decode()
        for batch in self._decoded(batches, first) if decoded else batches[first:]:
            self._served += 1
            yield batch

    def _decoded(self, batches: list[Tensor], first: int) -> Iterator[Row]:
        assert self._store is not None
        requests = [self._request(self._epoch, step, index) for step, index in enumerate(batches)]
        return self._store.decode(requests[first:], self.seed)

    def _checked(self, chosen: Tensor) -> list[Tensor]:
        """The batches that a method has chosen, if they can be served."""
        if chosen.ndim != 2 or len(chosen) != len(self) or chosen.shape[1] < 1 or chosen.dtype != torch.int64:
            raise ValueError(
                f"expected batches ({len(self)}, B) of int64 positions, one row per step, got {tuple(chosen.shape)} of "
                f"{chosen.dtype}; the number of steps is the same in every epoch, so draw in rounds to fill them"
            )
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0:
            raise ValueError(f"expected positions of 0 or more in the batches of an epoch, got {low} to {high}")
        return list(chosen.cpu())

    def _batches(self) -> list[Tensor]:
        """The index batches of a whole epoch of this process."""
        pool = torch.arange(self.num_samples) if self._pool is None else self._pool(self._epoch)
        if not self.shuffle:
            share = pool[self.rank :: self.world_size]
            if math.ceil(len(share) / self.batch_size) != len(self):
                return list(share.tensor_split(len(self)))
            return list(torch.split(share, self.batch_size))
        generator = named_generator("order", self.seed, 0 if self.fixed_order else self._epoch)
        order = torch.randperm(len(pool), generator=generator)
        padded = self.num_samples + -self.num_samples % self.world_size
        order = pool[order[torch.arange(padded) % len(pool)]]
        return list(torch.split(order[self.rank :: self.world_size], self.batch_size))[: len(self)]
