"""State with one row per training sample, declared as torchmetrics declares metric states.

A :class:`SampleState` is found by a callback wherever it lies in a module, sized before training, synced over the processes at
the end of every epoch, and saved with what all processes know. Its tables are plain tensors with extra state, not buffers:
DistributedDataParallel overwrites buffers with those of rank 0 in every forward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.random_streams import process_rank, several_processes

__all__ = [
    "EMATargets",
    "EpochMean",
    "History",
    "LabelStore",
    "LearnableTargets",
    "RunningVariance",
    "SampleState",
]

Reduction = Literal["mean", "sum", None]


class SampleState(nn.Module):
    """Tables with one row per training sample, shape (N, ...).

    Each table is declared by :meth:`add_state` and is an attribute of that name. Rows are written locally, without
    communication; :meth:`sync` makes the tables those of all processes.
    """

    required = True
    """Whether training needs a data module that knows the number of its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.num_samples = 0
        self._states: dict[str, tuple[tuple[int, ...], torch.dtype, float, Reduction]] = {}
        self._written: dict[str, Tensor] = {}  # (N,): processes that wrote a row since the last sync; here 0 or 1
        self._start: dict[str, Tensor] = {}  # rows at the last sync, kept where several processes write

    def add_state(
        self,
        name: str,
        shape: tuple[int, ...] = (),
        *,
        dtype: torch.dtype = torch.float32,
        default: float = 0.0,
        dist_reduce_fx: Reduction = "mean",
    ) -> None:
        """Declare a table.

        Args:
            name: attribute that holds the table, shape (N, ``*shape``).
            shape: of one row.
            dtype: of the table; it does not follow the precision of the module.
            default: value of every row before anything is written.
            dist_reduce_fx: how :meth:`sync` merges what the processes wrote since the last one. ``"mean"``: a row becomes the
                mean over the processes that wrote it; of integers and booleans the row of the lowest rank that wrote it.
                ``"sum"``: what each process added is added up. None: all processes write the same, and nothing is exchanged.
        """
        self._states[name] = (tuple(shape), dtype, default, dist_reduce_fx)
        setattr(self, name, torch.full((self.num_samples, *shape), default, dtype=dtype))
        self._written[name] = torch.zeros(self.num_samples, dtype=torch.float32)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def device(self) -> torch.device:
        """The device of the tables."""
        return next((getattr(self, name).device for name in self._states), torch.device("cpu"))

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Set every row to its default and make room for ``num_samples`` samples.

        Args:
            num_samples: N.
            labels: the given labels, shape (N,), for tables that start from them.
        """
        device = self.device
        self.num_samples = num_samples
        self._start.clear()
        for name, (shape, dtype, default, _) in self._states.items():
            setattr(self, name, torch.full((num_samples, *shape), default, dtype=dtype, device=device))
            self._written[name] = torch.zeros(num_samples, device=device)

    @torch.no_grad()
    def write(self, name: str, index: Tensor, rows: Tensor) -> None:
        """Set rows of a table; local, without waiting for the device.

        Args:
            name: of the table.
            index: positions in the training set, shape (B,). Of a position that occurs twice, one of the rows is kept.
            rows: shape (B, ...).

        Raises:
            ValueError: (on CPU) if an index is outside [0, N).
        """
        self.check(index)
        self._keep_start(name)
        table = getattr(self, name)
        table[index] = rows.to(table.dtype)
        self._written[name].index_fill_(0, index, 1.0)

    @torch.no_grad()
    def add(self, name: str, index: Tensor, rows: Tensor) -> None:
        """Add to rows of a table that is merged by ``"sum"``; a position may occur several times. See :meth:`write`."""
        self.check(index)
        self._keep_start(name)
        table = getattr(self, name)
        table.index_add_(0, index, rows.to(table.dtype))

    def check(self, index: Tensor) -> None:
        """Raise ValueError if, on the CPU, a position lies outside [0, N)."""
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"expected sample indices in [0, {len(self)}), got {int(index.min())} to {int(index.max())}; the index "
                "of a batch counts the training samples from 0"
            )

    def _keep_start(self, name: str) -> None:
        if several_processes() and name not in self._start and self._states[name][3] is not None:
            self._start[name] = getattr(self, name).clone()

    def sync(self) -> None:
        """Make the tables those of all processes. A collective: every process must call it."""
        if several_processes():
            for name, rows in self._merged().items():
                setattr(self, name, rows[0])
        for written in self._written.values():
            written.zero_()
        self._start.clear()

    def _merged(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return, for each table that is exchanged, its merged rows and how many processes wrote each. A collective."""
        merged = {}
        for name, (_, dtype, _, reduction) in self._states.items():
            if reduction is None:
                continue
            rows = getattr(self, name)
            count = _reduced(self._written[name])
            if reduction == "sum":
                start = self._start.get(name, rows)
                merged[name] = (start + _reduced(rows - start), count)
                continue
            wrote = self._written[name].clamp(max=1).view(-1, *[1] * (rows.ndim - 1))
            seen = count.view_as(wrote)
            if dtype.is_floating_point:
                mean = _reduced(rows * self._written[name].view_as(wrote)) / seen.clamp(min=1)
                merged[name] = (torch.where(seen > 0, mean, rows), count)
            else:
                mine = torch.where(self._written[name] > 0, process_rank(), torch.iinfo(torch.int64).max)
                first = _reduced(mine, torch.distributed.ReduceOp.MIN) if several_processes() else mine
                chosen = ((first == mine) & (self._written[name] > 0)).view_as(wrote)
                value = _reduced(torch.where(chosen, rows.long(), 0)).to(dtype)
                merged[name] = (torch.where(seen > 0, value, rows), count)
        return merged

    def synced_state(self) -> dict[str, Any]:
        """Return the state with what all processes wrote; the tables stay as they are. A collective."""
        state = self.get_extra_state()
        if several_processes():
            state["start"] = {}  # of the tables that were written since the last sync
            for name, (rows, count) in self._merged().items():
                state["tables"][name], state["written"][name] = rows.cpu(), count.cpu()
                start = self._start.get(name, getattr(self, name))
                if not torch.equal(start, rows):
                    state["start"][name] = start.cpu().clone()
        return state

    def get_extra_state(self) -> dict[str, Any]:
        """Return all tables, on the CPU, as tensors and plain Python."""
        return {
            "tables": {name: getattr(self, name).detach().cpu().clone() for name in self._states},
            "written": {name: written.cpu().clone() for name, written in self._written.items()},
            "start": {name: rows.cpu().clone() for name, rows in self._start.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state of any number of samples.

        Rows that were written since the last sync go to rank 0, with the number of processes that wrote them; the other
        processes go on from the last sync, so that nothing counts twice.

        Raises:
            RuntimeError: if a table is missing, as in checkpoints of another version.
        """
        state = self.upgrade_state(state) if "tables" not in state else state
        missing = [name for name in self._states if name not in state["tables"]]
        if missing:
            raise RuntimeError(f"{type(self).__name__} has no {', '.join(missing)}, as one of another version")
        if len(self) and not any(len(rows) for rows in state["tables"].values()):
            return  # saved before it had a size
        device, first = self.device, process_rank() == 0
        self._start.clear()
        for name, (_, dtype, _, reduction) in self._states.items():
            rows = state["tables"][name].to(device, dtype)
            start = state["start"].get(name, rows).to(device, dtype)
            written = state["written"].get(name, torch.zeros(len(rows))).to(device, torch.float32)
            setattr(self, name, (rows if first or reduction is None else start).clone())
            self._written[name] = written.clone() if first else torch.zeros_like(written)
            if several_processes() and reduction is not None and (name in state["start"] or bool(rows.any())):
                self._start[name] = start.clone()
        self.num_samples = len(state["tables"][next(iter(self._states))]) if self._states else 0

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Bring the state of an earlier version to the present form."""
        return {"tables": dict(state), "written": {}, "start": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SampleState":
        super()._apply(fn, recurse)
        for holder in (self.__dict__, self._written, self._start):
            for name in self._states:
                if isinstance(holder.get(name), Tensor):
                    holder[name] = holder[name].to(fn(torch.zeros_like(holder[name][:0])).device)  # never the precision
        return self


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


class EMATargets(SampleState):
    """A running mean of the class probabilities of each sample, updated at once (ELR, Liu et al., NeurIPS 2020).

    Args:
        num_classes: C.
        decay: fraction of the old row that stays at an update, in [0, 1).

    Raises:
        ValueError: if ``decay`` is out of its range.
    """

    value: Tensor
    """(N, C) float32; zeros where a sample was never seen."""

    def __init__(self, num_classes: int, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.add_state("value", (num_classes,))

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> Tensor:
        """Move the rows ``index`` (B,) towards ``probs`` (B, C) and return the new rows (B, C). Local, no communication."""
        self.check(index)
        rows = self.decay * self.value[index] + (1 - self.decay) * probs.float()
        self.write("value", index, rows)
        return rows

    def upgrade_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Read the three tables of the earlier version."""
        return {
            "tables": {"value": state["value"]},
            "written": {"value": state["touched"]},
            "start": {"value": state["start"]},
        }


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


class LabelStore(SampleState):
    """The label that a method believes of each sample, and what it thinks of the given one.

    Args:
        num_classes: C, for tables of soft targets; None keeps no such table.
        dist_reduce_fx: as for :meth:`SampleState.add_state`; None where every process writes the same.
    """

    labels: Tensor
    """(N,) int64: given labels, or corrected ones."""
    selected: Tensor
    """(N,) bool: whether the method learns from the label."""
    quality: Tensor
    """(N,) float32 in [0, 1]: quality of ``labels``."""
    given_quality: Tensor
    """(N,) float32 in [0, 1]: quality of the given labels."""
    targets: Tensor
    """(N, C) float32: soft labels, where the store has them."""

    def __init__(self, num_classes: int | None = None, dist_reduce_fx: Reduction = "mean") -> None:
        super().__init__()
        self.filled = False
        self.num_classes = num_classes
        self.add_state("labels", dtype=torch.int64, dist_reduce_fx=dist_reduce_fx)
        self.add_state("selected", dtype=torch.bool, default=1, dist_reduce_fx=dist_reduce_fx)
        self.add_state("quality", default=1.0, dist_reduce_fx=dist_reduce_fx)
        self.add_state("given_quality", default=1.0, dist_reduce_fx=dist_reduce_fx)
        if num_classes is not None:
            self.add_state("targets", (num_classes,), dist_reduce_fx=dist_reduce_fx)

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Start from the given labels, all of them selected and trusted."""
        super().reset(num_samples)
        self.filled = False
        if labels is not None:
            self.labels = labels.to(self.labels).clone()
            if self.num_classes is not None:
                self.targets = F.one_hot(self.labels, self.num_classes).float()

    def update(self, **tables: Tensor) -> None:
        """Replace whole tables, each of N rows, which must be the same in all processes."""
        for name, rows in tables.items():
            old = getattr(self, name)
            setattr(self, name, rows.to(old.device, old.dtype).clone())
        self.filled = True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the tables, and whether a method has filled them."""
        return {**super().get_extra_state(), "filled": self.filled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state; one of the earlier version was filled where it has rows."""
        super().set_extra_state(state)
        self.filled = bool(state.get("filled", len(state.get("labels", ())) > 0))


class LearnableTargets(SampleState):
    """Label logits of each sample that are learned with the network, by plain gradient descent (PENCIL).

    Args:
        num_classes: C.
        scale: logit of the given label at the start; the others are 0.
    """

    logits: Tensor
    """(N, C) float32."""

    def __init__(self, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.num_classes, self.scale = num_classes, scale
        self.add_state("logits", (num_classes,))
        self._leaf: Tensor | None = None

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Start from the given labels: ``scale`` times their one-hot rows."""
        super().reset(num_samples)
        if labels is not None:
            self.logits = self.scale * F.one_hot(labels, self.num_classes).to(self.logits)

    def forward(self, index: Tensor) -> Tensor:
        """Return the logits of a batch, index (B,) -> (B, C), as a leaf that takes a gradient."""
        self._leaf = self.logits[index].clone().requires_grad_()
        return self._leaf

    def sgd_step(self, index: Tensor, lr: float) -> None:
        """Move the rows of the last :meth:`forward` against the gradient that they got; after the backward pass.

        Args:
            index: positions in the training set, shape (B,), as in that forward.
            lr: learning rate.
        """
        if self._leaf is not None and self._leaf.grad is not None:
            self.write("logits", index, self._leaf.detach() - lr * self._leaf.grad)
        self._leaf = None


def _reduced(tensor: Tensor, operation: Any = None) -> Tensor:
    """Return the sum of a tensor over all processes, or what another operation makes of it. A collective."""
    total = tensor.clone()
    if several_processes():
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM if operation is None else operation)
    return total
