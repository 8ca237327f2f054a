"""Statistics of each sample over epochs: means, the last rows, variance."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.per_sample.state import Reduction, SampleState

__all__ = ["EpochMean", "History", "RunningVariance"]


class EpochMean(SampleState):
    """Mean of what was noted of each sample in an epoch, and its history over the epochs.

    Args:
        decay: fraction of the old value that stays when an epoch is taken in, in [0, 1); 0 keeps the last epoch only.
        running_mean: weigh all epochs alike instead; ``decay`` is then not used.

    Raises:
        ValueError: if ``decay`` is out of its range.
    """

    value: Tensor
    """(N,) float32; 0 where ``epochs`` is 0."""
    epochs: Tensor
    """(N,) float32: number of epochs in which the sample was seen."""
    sum: Tensor
    count: Tensor

    def __init__(self, decay: float = 0.0, running_mean: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in [0, 1), got {decay}")
        self.decay, self.running_mean = decay, running_mean
        self.add_state("value", dist_reduce_fx=None)
        self.add_state("epochs", dist_reduce_fx=None)
        self.add_state("sum", dist_reduce_fx="sum")
        self.add_state("count", dist_reduce_fx="sum")

    def update(self, index: Tensor, value: Tensor) -> None:
        """Note ``value`` (B,) of the samples ``index`` (B,). Local, without waiting for the device.

        Raises:
            ValueError: (on CPU) if an index is outside [0, N).
        """
        self.add("sum", index, value.detach().float())
        self.add("count", index, torch.ones_like(index, dtype=torch.float32))

    def sync(self) -> None:
        """Exchange nothing: the sums of an epoch are taken in by :meth:`compute`."""

    def compute(self) -> Tensor:
        """Take the sums of all processes into the values and return those, (N,). A collective; once per epoch."""
        super().sync()
        seen = self.count > 0
        new = self.sum / self.count.clamp(min=1)
        old = self.epochs / (self.epochs + 1) if self.running_mean else self.decay * (self.epochs > 0)
        self.value = torch.where(seen, old * self.value + (1 - old) * new, self.value)
        self.epochs = self.epochs + seen
        self.sum = torch.zeros_like(self.sum)
        self.count = torch.zeros_like(self.count)
        return self.value


class History(SampleState):
    """The last ``length`` rows that were appended for each sample.

    Args:
        length: rows kept, >= 1.
        shape: of one row.
        dtype: of the rows.
        dist_reduce_fx: as for :meth:`SampleState.add_state`; None where every process appends the same.

    Raises:
        ValueError: if ``length`` is out of its range.
    """

    rows: Tensor
    """(N, length, ...): a ring; the row of the k-th append is at place k modulo ``length``."""
    count: Tensor
    """(N,) int64: appends so far."""

    def __init__(
        self,
        length: int,
        shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32,
        dist_reduce_fx: Reduction = "mean",
    ) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"expected a length of 1 or more, got {length}")
        self.length = length
        self.add_state("rows", (length, *shape), dtype=dtype, dist_reduce_fx=dist_reduce_fx)
        self.add_state("count", dtype=torch.int64, dist_reduce_fx=dist_reduce_fx)

    def append(self, index: Tensor, rows: Tensor) -> None:
        """Append one row (B, ...) to the samples ``index`` (B,), each of which occurs once."""
        self.check(index)
        ring = self.rows[index]
        ring[torch.arange(len(index), device=ring.device), self.count[index] % self.length] = rows.to(ring.dtype)
        self.write("rows", index, ring)
        self.write("count", index, self.count[index] + 1)

    def mean(self, index: Tensor | None = None) -> Tensor:
        """Return the mean of the rows that are kept, (B, ...); zeros where there is none. All samples without ``index``."""
        rows, count = (self.rows, self.count) if index is None else (self.rows[index], self.count[index])
        kept = count.clamp(max=self.length).view(-1, *[1] * (rows.ndim - 2))
        return rows.float().sum(1) / kept.clamp(min=1)

    def votes(self, index: Tensor, num_classes: int) -> Tensor:
        """Return how often each class is among the rows that are kept, (B, C), for rows that are class indices."""
        rows, count = self.rows[index], self.count[index]
        kept = torch.arange(self.length, device=rows.device) < count[:, None]
        return (F.one_hot(rows.long(), num_classes) * kept[..., None]).sum(1).float()


class RunningVariance(SampleState):
    """Mean and variance of what was noted of each sample so far (Welford's algorithm; ActiveBias)."""

    average: Tensor
    """(N,) float32."""
    squares: Tensor
    """(N,) float32: sum of squared distances from the mean."""
    count: Tensor
    """(N,) int64."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("average")
        self.add_state("squares")
        self.add_state("count", dtype=torch.int64)

    @torch.no_grad()
    def update(self, index: Tensor, value: Tensor) -> None:
        """Take in ``value`` (B,) of the samples ``index`` (B,), each of which occurs once."""
        self.check(index)
        value, count = value.detach().float(), self.count[index] + 1
        distance = value - self.average[index]
        average = self.average[index] + distance / count
        self.write("squares", index, self.squares[index] + distance * (value - average))
        self.write("average", index, average)
        self.write("count", index, count)

    def var(self, index: Tensor) -> Tensor:
        """Return the variance of each sample (B,), with divisor n; 0 where nothing was noted."""
        return self.squares[index] / self.count[index].clamp(min=1)
