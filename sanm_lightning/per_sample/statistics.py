"""Statistics of each sample over epochs: means, histories and variances."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.per_sample.state import Reduction, SampleState

__all__ = ["EpochMean", "History", "RunningVariance"]


class EpochMean(SampleState):
    """Mean of the recorded values of each sample in an epoch, averaged over epochs.

    Args:
        decay: weight of the old value in the update after an epoch, in [0, 1); 0 keeps the last epoch only.
        running_mean: whether to weight all epochs equally; ``decay`` is then ignored.

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
        """Record ``value`` (B,) of samples ``index`` (B,), without communication or device synchronization.

        Raises:
            ValueError: (on CPU) if an index is outside [0, N).
        """
        self.add("sum", index, value.detach().float())
        self.add("count", index, torch.ones_like(index, dtype=torch.float32))

    def sync(self) -> None:
        """Do nothing: :meth:`compute` synchronizes the sums of an epoch."""

    def compute(self) -> Tensor:
        """Update and return the values (N,) with the sums of all processes. Collective; call it once per epoch."""
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
    """The last ``length`` rows appended for each sample.

    Args:
        length: number of stored rows, >= 1.
        shape: shape of one row.
        dtype: dtype of the rows.
        dist_reduce_fx: as for :meth:`SampleState.add_state`; None if every process appends the same rows.

    Raises:
        ValueError: if ``length`` is out of its range.
    """

    rows: Tensor
    """(N, length, ...): ring buffer; the row of the k-th append is at position k modulo ``length``."""
    count: Tensor
    """(N,) int64: number of appended rows."""

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
        """Append one row (B, ...) to each of the samples ``index`` (B,), without duplicates."""
        self.check(index)
        ring = self.rows[index]
        ring[torch.arange(len(index), device=ring.device), self.count[index] % self.length] = rows.to(ring.dtype)
        self.write("rows", index, ring)
        self.write("count", index, self.count[index] + 1)

    def mean(self, index: Tensor | None = None) -> Tensor:
        """Return the mean of the stored rows, (B, ...), or of all samples without ``index``; zeros without rows."""
        rows, count = (self.rows, self.count) if index is None else (self.rows[index], self.count[index])
        kept = count.clamp(max=self.length).view(-1, *[1] * (rows.ndim - 2))
        return rows.float().sum(1) / kept.clamp(min=1)

    def votes(self, index: Tensor, num_classes: int, missing_as_zero: bool = False) -> Tensor:
        """Return the count of each class among the stored rows, (B, C), for rows of class indices.

        Args:
            index: positions in the training set, shape (B,).
            num_classes: C.
            missing_as_zero: whether missing rows count as class 0.
        """
        rows, count = self.rows[index], self.count[index]
        kept = torch.arange(self.length, device=rows.device) < count[:, None]
        votes = (F.one_hot(rows.long(), num_classes) * kept[..., None]).sum(1).float()
        if missing_as_zero:
            votes[:, 0] += (self.length - count).clamp(min=0)
        return votes


class RunningVariance(SampleState):
    """Mean and variance of the recorded values of each sample (Welford's algorithm; ActiveBias)."""

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
        """Record ``value`` (B,) of the samples ``index`` (B,), without duplicates."""
        self.check(index)
        value, count = value.detach().float(), self.count[index] + 1
        distance = value - self.average[index]
        average = self.average[index] + distance / count
        self.write("squares", index, self.squares[index] + distance * (value - average))
        self.write("average", index, average)
        self.write("count", index, count)

    def var(self, index: Tensor) -> Tensor:
        """Return the variance of each sample (B,), with divisor n; 0 without recorded values."""
        return self.squares[index] / self.count[index].clamp(min=1)
