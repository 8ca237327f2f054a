"""State with one row per training sample, declared as torchmetrics declares metric states.

A :class:`SampleState` is found by a callback wherever it lies in a module, sized before training, synced over the processes at
the end of every epoch, and saved with what all processes know. Its tables are plain tensors with extra state, not buffers:
DistributedDataParallel overwrites buffers with those of rank 0 in every forward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sanm_lightning.random_streams import process_rank, several_processes

__all__ = ["Reduction", "SampleState"]

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


def _reduced(tensor: Tensor, operation: Any = None) -> Tensor:
    """Return the sum of a tensor over all processes, or what another operation makes of it. A collective."""
    total = tensor.clone()
    if several_processes():
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM if operation is None else operation)
    return total
