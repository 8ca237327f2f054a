"""What is remembered of each training sample: saved, reset and merged across ranks in one stated way.

Saved? In the state dict, as tensors (``get_extra_state``). Reset when? At :meth:`SampleBank.fold`, once per epoch, the
partial sums; the values stay. Merged how? Sums and counts are added over ranks, so a sample that a distributed sampler
served twice weighs no more than any other.

Not registered buffers: DistributedDataParallel overwrites those with rank 0's copy at every forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.random_streams import process_rank, several_processes

__all__ = ["SampleBank", "TargetBank"]


class SampleBank(nn.Module):
    """The mean of what was observed of each sample in an epoch, and a running mean of that over the epochs.

    Args:
        size: N, the number of training samples.
        momentum: share of the old value that stays when an epoch is folded in, in [0, 1): 0 keeps the last epoch only.
        running_mean: weigh all epochs alike instead; ``momentum`` is then not used.
    """

    _names = ("value", "epochs", "sum", "count")

    value: Tensor
    """(N,) float32: the folded value of each sample; 0 where ``epochs`` is 0."""
    epochs: Tensor
    """(N,) float32: the number of epochs in which the sample was seen."""
    sum: Tensor
    count: Tensor

    def __init__(self, size: int = 0, momentum: float = 0.0, running_mean: bool = False) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"expected a momentum in [0, 1), got {momentum}")
        self.momentum, self.running_mean = momentum, running_mean
        self.resize(size)

    def __len__(self) -> int:
        return len(self.value)

    def resize(self, size: int) -> None:
        """Forget everything and make room for ``size`` samples."""
        device = getattr(self, "value", torch.zeros(0)).device
        for name in self._names:
            setattr(self, name, torch.zeros(size, device=device, dtype=torch.float32))

    def observe(self, index: Tensor, value: Tensor) -> None:
        """Note ``value`` (B,) for the samples ``index`` (B,). Local to this rank, no communication.

        Raises:
            ValueError: (on CPU) if an index is outside [0, N).
        """
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"expected sample indices in [0, {len(self)}), got {int(index.min())} to {int(index.max())}; the index "
                "of a batch counts the training samples from 0"
            )
        self.sum.index_add_(0, index, value.detach().float())
        self.count.index_add_(0, index, torch.ones_like(index, dtype=torch.float32))

    def fold(self) -> None:
        """Take the epoch's means into the values. A collective under torch.distributed: every rank must call it."""
        total, count = _sum_over_ranks(self.sum), _sum_over_ranks(self.count)
        seen = count > 0
        new = total / count.clamp(min=1)
        old_share = self.epochs / (self.epochs + 1) if self.running_mean else self.momentum * (self.epochs > 0)
        self.value = torch.where(seen, old_share * self.value + (1 - old_share) * new, self.value)
        self.epochs = self.epochs + seen
        self.sum.zero_()
        self.count.zero_()

    def complete_state(self) -> dict[str, Tensor]:
        """Return the state with the partial sums of all ranks. A collective under torch.distributed."""
        partial = {"sum": _sum_over_ranks(self.sum).cpu(), "count": _sum_over_ranks(self.count).cpu()}
        return {**self.get_extra_state(), **partial}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU. The partial sums are this rank's own."""
        return {name: getattr(self, name).detach().cpu().clone() for name in self._names}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over a state. Partial sums go to rank 0 only, where they came from all ranks: they are added up again."""
        for name in self._names:
            tensor = state[name].to(self.value.device, torch.float32).clone()
            lost = name in ("sum", "count") and process_rank() != 0
            setattr(self, name, torch.zeros_like(tensor) if lost else tensor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SampleBank":
        super()._apply(fn, recurse)
        for name in self._names:
            tensor = getattr(self, name)
            setattr(self, name, tensor.to(fn(tensor).device))  # follow the device, never the precision
        return self


class TargetBank(nn.Module):
    """A running mean of the class probabilities of each sample, updated at once: the target memory of ELR.

    Saved as tensors (``get_extra_state``). Merged at :meth:`merge`, once per epoch: a row that one process updated is taken
    from it, a row that several updated (a distributed loader may serve a sample twice) is the mean of theirs.

    Args:
        size: N, the number of training samples.
        num_classes: C.
        momentum: share of the old row that stays at an update, in [0, 1).
    """

    _names = ("value", "touched", "start")

    value: Tensor
    """(N, C) float32; zeros where a sample was never seen."""
    touched: Tensor
    """(N,) float32: 1 where this process updated the row since the last merge; more where, before a resume, several did."""
    start: Tensor
    """(N, C) float32: the rows at the last merge, from which a process goes on that has not updated them since."""

    def __init__(self, size: int, num_classes: int, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"expected a momentum in [0, 1), got {momentum}")
        self.num_classes, self.momentum = num_classes, momentum
        self.resize(size)

    def __len__(self) -> int:
        return len(self.value)

    def resize(self, size: int) -> None:
        """Forget everything and make room for ``size`` samples."""
        device = getattr(self, "value", torch.zeros(0)).device
        self.value = torch.zeros(size, self.num_classes, device=device, dtype=torch.float32)
        self.touched = torch.zeros(size, device=device, dtype=torch.float32)
        self.start = torch.zeros_like(self.value)

    @torch.no_grad()
    def update(self, index: Tensor, probabilities: Tensor) -> Tensor:
        """Move the rows ``index`` (B,) towards ``probabilities`` (B, C); return the new rows (B, C). Local, no communication.

        An index that occurs twice in a batch keeps one of its two new rows.
        """
        rows = self.momentum * self.value[index] + (1 - self.momentum) * probabilities.float()
        self.value[index] = rows
        self.touched[index] = self.touched[index].clamp(min=1)
        return rows

    def merge(self) -> None:
        """Make the rows those of all processes. A collective under torch.distributed: every rank must call it."""
        self.value, _ = self._merged()
        self.touched.zero_()
        self.start = self.value.clone()

    def _merged(self) -> tuple[Tensor, Tensor]:
        count = _sum_over_ranks(self.touched)
        total = _sum_over_ranks(self.value * self.touched.unsqueeze(1))
        seen = count.unsqueeze(1)
        return torch.where(seen > 0, total / seen.clamp(min=1), self.value), count

    def complete_state(self) -> dict[str, Tensor]:
        """Return the state with the rows of all processes. A collective under torch.distributed."""
        value, touched = self._merged()
        return {"value": value.cpu(), "touched": touched.cpu(), "start": self.start.cpu().clone()}

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return all tensors, on the CPU."""
        return {name: getattr(self, name).detach().cpu().clone() for name in self._names}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take over a state, whatever the number of samples was before.

        Rows that were updated since the last merge go to rank 0 only, with the number of processes that did: the others go on
        from the last merge, as they would have, and nothing counts twice.
        """
        first = process_rank() == 0
        for name, source in (("value", "value" if first else "start"), ("touched", "touched"), ("start", "start")):
            tensor = state[source].to(self.value.device, torch.float32).clone()
            setattr(self, name, tensor if first or name != "touched" else torch.zeros_like(tensor))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "TargetBank":
        super()._apply(fn, recurse)
        for name in self._names:
            tensor = getattr(self, name)
            setattr(self, name, tensor.to(fn(tensor).device))  # follow the device, never the precision
        return self


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    if several_processes():
        torch.distributed.all_reduce(total)
    return total
