"""State with one row per training sample, declared like the metric states of torchmetrics.

A callback finds every :class:`SampleState` in a module, resizes it before training, synchronizes it over processes at
the end of every epoch, and saves the values of all processes. The tables are tensors saved as extra state, not buffers,
because DistributedDataParallel overwrites buffers with those of rank 0 in every forward.
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
    communication; :meth:`sync` merges the tables of all processes.
    """

    required = True
    """Whether training requires a data module with ``num_samples``."""

    def __init__(self) -> None:
        super().__init__()
        self.num_samples = 0
        self.given: int | None = None
        """Checksum of the given labels of the training set that the rows belong to; None if unknown."""
        self._states: dict[str, tuple[tuple[int, ...], torch.dtype, float, Reduction]] = {}
        self._written: dict[str, Tensor] = {}  # (N,): number of processes that wrote a row since the last sync
        self._start: dict[str, Tensor] = {}  # rows at the last sync, with several processes only

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
            name: name of the attribute with the table, shape (N, ``*shape``).
            shape: shape of one row.
            dtype: dtype of the table, independent of the precision of the module.
            default: initial value of every row.
            dist_reduce_fx: how :meth:`sync` merges the rows that the processes wrote since the last sync. ``"mean"``:
                the mean over the processes that wrote the row; for integers and booleans, the row of the lowest rank
                that wrote it. ``"sum"``: the sum of the added values. None: all processes write the same values, and
                nothing is exchanged.
        """
        self._states[name] = (tuple(shape), dtype, default, dist_reduce_fx)
        setattr(self, name, torch.full((self.num_samples, *shape), default, dtype=dtype))
        self._written[name] = torch.zeros(self.num_samples, dtype=torch.float32)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return next((getattr(self, name).device for name in self._states), torch.device("cpu"))

    def reset(self, num_samples: int, labels: Tensor | None = None) -> None:
        """Resize the tables to ``num_samples`` rows and set every row to its default.

        Args:
            num_samples: N, number of training samples.
            labels: given labels, shape (N,), for tables that are initialized from them.
        """
        device = self.device
        self.num_samples = num_samples
        self._start.clear()
        for name, (shape, dtype, default, _) in self._states.items():
            setattr(self, name, torch.full((num_samples, *shape), default, dtype=dtype, device=device))
            self._written[name] = torch.zeros(num_samples, device=device)

    @torch.no_grad()
    def write(self, name: str, index: Tensor, rows: Tensor) -> None:
        """Set rows of a table, without communication or device synchronization.

        Args:
            name: name of the table.
            index: positions in the training set, shape (B,). For duplicate positions, one of the rows is kept.
            rows: new rows, shape (B, ...).

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
        """Add to rows of a table with reduction ``"sum"``; duplicate positions are allowed. See :meth:`write`."""
        self.check(index)
        self._keep_start(name)
        table = getattr(self, name)
        table.index_add_(0, index, rows.to(table.dtype))

    def check(self, index: Tensor) -> None:
        """Raise ValueError if a position on the CPU is outside [0, N)."""
        if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise ValueError(
                f"expected sample indices in [0, {len(self)}), got {int(index.min())} to {int(index.max())}; number "
                "the training samples from 0"
            )

    def _keep_start(self, name: str) -> None:
        if several_processes() and name not in self._start and self._states[name][3] is not None:
            self._start[name] = getattr(self, name).clone()

    def sync(self) -> None:
        """Merge the tables of all processes. A collective operation: every process must call it."""
        if several_processes():
            for name, rows in self._merged().items():
                setattr(self, name, rows[0])
        for written in self._written.values():
            written.zero_()
        self._start.clear()

    def _merged(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return merged rows of each exchanged table, and the number of processes that wrote them. Collective."""
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
                mine = torch.where(wrote > 0, rows * self._written[name].view_as(wrote), 0)  # NaN * 0 is NaN
                mean = _reduced(mine) / seen.clamp(min=1)
                merged[name] = (torch.where(seen > 0, mean, rows), count)
            else:
                mine = torch.where(self._written[name] > 0, process_rank(), torch.iinfo(torch.int64).max)
                first = _reduced(mine, torch.distributed.ReduceOp.MIN) if several_processes() else mine
                chosen = ((first == mine) & (self._written[name] > 0)).view_as(wrote)
                value = _reduced(torch.where(chosen, rows.long(), 0)).to(dtype)
                merged[name] = (torch.where(seen > 0, value, rows), count)
        return merged

    def synced_state(self) -> dict[str, Any]:
        """Return the merged state of all processes; the tables are unchanged. A collective operation."""
        state = self.get_extra_state()
        if several_processes():
            state["start"] = {}  # tables written since the last sync
            for name, (rows, count) in self._merged().items():
                state["tables"][name], state["written"][name] = rows.cpu(), count.cpu()
                start = self._start.get(name, getattr(self, name))
                if not torch.equal(start, rows):
                    state["start"][name] = start.cpu().clone()
        return state

    def get_extra_state(self) -> dict[str, Any]:
        """Return all tables, on the CPU, as tensors and built-in types."""
        return {
            "tables": {name: getattr(self, name).detach().cpu().clone() for name in self._states},
            "written": {name: written.cpu().clone() for name, written in self._written.items()},
            "start": {name: rows.cpu().clone() for name, rows in self._start.items()},
            "given": self.given,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state of any number of samples.

        Rows written since the last sync are restored on rank 0, with the number of processes that wrote them; the other
        processes restore the rows of the last sync, so that nothing is counted twice.

        Raises:
            RuntimeError: if a table is missing, as in checkpoints of another version.
        """
        state = self.upgrade_state(state) if "tables" not in state else state
        missing = [name for name in self._states if name not in state["tables"]]
        if missing:
            raise RuntimeError(
                f"expected the tables {', '.join(missing)} of {type(self).__name__}, got the state of another version"
            )
        if len(self) and not any(len(rows) for rows in state["tables"].values()):
            return  # saved before the tables were resized
        device, first, self.given = self.device, process_rank() == 0, state.get("given")
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
        """Convert the state of an earlier version to the current format."""
        return {"tables": dict(state), "written": {}, "start": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SampleState":
        super()._apply(fn, recurse)
        for holder in (self.__dict__, self._written, self._start):
            for name in self._states:
                if isinstance(holder.get(name), Tensor):
                    holder[name] = holder[name].to(
                        fn(torch.zeros_like(holder[name][:0])).device
                    )  # device only, not the dtype
        return self


def _reduced(tensor: Tensor, operation: Any = None) -> Tensor:
    """Return a tensor reduced over all processes, by default its sum. A collective operation."""
    total = tensor.clone()
    if several_processes():
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM if operation is None else operation)
    return total
