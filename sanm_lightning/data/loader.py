"""A loader of sample indices that remembers where it is."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = ["ImageDataset", "IndexLoader", "seeded_generator"]

IndexedBatch = Tensor | tuple[Tensor, Tensor]


class ImageDataset(Protocol):
    """A map-style data set of decoded images: ``dataset[i]`` is a uint8 tensor of shape (3, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


def seeded_generator(seed: int, *words: int) -> torch.Generator:
    """A CPU generator whose stream is a function of all the numbers, and unrelated for any two different lists of them.

    Args:
        seed: 0 or more.
        words: what the stream is for: an epoch, a rank, a batch number; each 0 or more.
    """
    # Adding the numbers up would make (epoch 1, rank 0) and (epoch 0, rank 1) the same stream, and one list of numbers
    # as entropy would make (0) and (0, 0) the same.
    state = np.random.SeedSequence(seed, spawn_key=words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


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
        dataset: a map-style data set of uint8 images (3, H, W), decoded in worker processes as they are needed.
        num_workers: worker processes that decode; 0 decodes in this one.
        fixed_order: the same permutation in every epoch, as over-fitting on a few batches needs it.

    Yields:
        Indices, shape (B,), int64; with a data set, indices and images, shape (B, 3, H, W), uint8. On the CPU.

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
        dataset: ImageDataset | None = None,
        num_workers: int = 0,
        fixed_order: bool = False,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"The loader needs a {name} of 1 or more, got {value}: choose a larger one.")
        if not 0 <= rank < world_size:
            raise ValueError(f"The rank must lie in 0 to {world_size - 1}, got {rank}: it counts the processes from 0.")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"The seed and num_workers must be 0 or more, got {seed} and {num_workers}: change them.")
        if dataset is not None and len(dataset) != num_samples:
            raise ValueError(f"The data set must hold {num_samples} samples, got {len(dataset)}: pass the same one.")
        if not shuffle and num_samples < world_size:
            raise ValueError(
                f"{num_samples} samples cannot be shared out over {world_size} processes: use at most {num_samples}."
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.fixed_order = fixed_order
        # Not called `dataset`: Lightning takes anything with that attribute for a DataLoader that it may rebuild.
        self._dataset = dataset
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
                f"The state of the loader must hold 'epoch' and 'batches', got {sorted(state)}: resume from a "
                "checkpoint that was written with this loader."
            )
        before = state.get("batch_size", self.batch_size), state.get("processes", self.world_size)
        if 0 < state["batches"] < state.get("of", len(self)) and before != (self.batch_size, self.world_size):
            raise ValueError(
                f"A checkpoint from the middle of an epoch must be resumed with its batch size of {before[0]} on {before[1]} "
                f"processes, got {self.batch_size} on {self.world_size}: give the same, or a checkpoint from an epoch's end."
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

    def __iter__(self) -> Iterator[IndexedBatch]:
        # A generator: nothing happens before the first batch is asked for. Lightning creates the first iterator before
        # it calls set_epoch.
        batches = self._batches()[self._skip :]
        self._served, self._skip = self._skip, 0
        for batch in self._with_images(batches) if self._dataset is not None else batches:
            self._served += 1
            yield batch

    def _batches(self) -> list[Tensor]:
        """The index batches of a whole epoch of this process."""
        if not self.shuffle:
            share = torch.arange(self.num_samples)[self.rank :: self.world_size]
            if math.ceil(len(share) / self.batch_size) != len(self):
                return list(share.tensor_split(len(self)))
            return list(torch.split(share, self.batch_size))
        generator = seeded_generator(self.seed, 0, 0 if self.fixed_order else self._epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        padding = -self.num_samples % self.world_size
        order = order[torch.arange(self.num_samples + padding) % self.num_samples]
        return list(torch.split(order[self.rank :: self.world_size], self.batch_size))[: len(self)]

    def _with_images(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._dataset is not None
        dataset = self._dataset
        if not isinstance(dataset, Dataset):
            dataset = _AsDataset(dataset)
        return zip(
            batches,
            DataLoader(
                dataset,
                batch_sampler=[batch.tolist() for batch in batches],
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                # A generator of its own: otherwise every epoch would draw from the global stream, and a resumed run
                # would differ in whatever else draws from it.
                generator=seeded_generator(self.seed, 0, self._epoch),
            ),
            strict=True,
        )


class _AsDataset(Dataset[Tensor]):
    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
