"""Run the cells of a study through submitit, several at once, with a progress display."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sanm_lightning.study import launch, state
from sanm_lightning.study.cells import Cell
from sanm_lightning.study.launch import Launch
from sanm_lightning.study.progress import Progressed
from sanm_lightning.study.record import Record
from sanm_lightning.study.state import State, is_locked

__all__ = ["run_cells", "submitit_executor"]

PROGRAM = (sys.executable, "-m", "sanm_lightning")
MINUTES = {"slurm": 24 * 60, "local": 366 * 24 * 60, "debug": 366 * 24 * 60}
"""Default time limit of a cell in minutes."""
WAIT = {"slurm": 10.0, "local": 0.5, "debug": 0.05}
"""Seconds between two looks at the jobs."""
_pause = time.sleep
CANCELED = 30.0
"""Maximum number of seconds to wait for canceled jobs."""


def submitit_executor(kind: str, folder: Path, options: dict[str, Any]) -> Any:
    """Return an executor of submitit.

    Args:
        kind: ``local``, ``slurm`` or ``debug``.
        folder: folder for pickled jobs and their logs.
        options: parameters of submitit, such as ``slurm_partition``.

    Raises:
        ModuleNotFoundError: if submitit is not installed.
        ValueError: if there is no SLURM, or a parameter is unknown.
    """
    try:
        import cloudpickle
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "expected submitit for a study, got an environment without it; install the extra 'study'"
        ) from error
    for module in (launch, state):
        cloudpickle.register_pickle_by_value(module)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=kind)
        executor.update_parameters(**{"name": "sanm-study", "timeout_min": MINUTES[kind], **options})
    except (AssertionError, NameError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"expected parameters of submitit under --slurm, got {', '.join(options)} ({reason}); see the documentation of "
            "submitit.AutoExecutor"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"expected the executor {kind}, got an environment without it ({error}); use --executor local"
        ) from error
    return executor


def run_cells(
    record: Record,
    cells: Sequence[Cell],
    executor: Any,
    kind: str,
    jobs: int,
    console: Console,
    threads: int | None = None,
) -> dict[str, State]:
    """Run all cells that are not finished, and return the states of all cells by folder.

    A cell starts when the run that it starts from is finished. Cells that another process runs are awaited. Ctrl-C cancels
    the jobs.

    Args:
        record: folder of the study.
        cells: the cells, each after the one that it starts from.
        executor: executor of submitit.
        kind: ``local``, ``slurm`` or ``debug``.
        jobs: maximum number of cells that run at once.
        console: where the progress is displayed.
        threads: number of threads of each cell; None lets the cells of this machine share its processors.
    """
    queue = _Queue(record, cells, executor, kind, jobs, console, threads)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(),
               TextColumn("{task.fields[left]}"))  # fmt: skip
    bar = Progress(*columns, console=console)
    task = bar.add_task("", total=1.0, left="")
    with bar if console.is_terminal else contextlib.nullcontext():
        try:
            going = True
            while going:
                going = queue.step()
                seen = Progressed.of(record, cells, queue.states, jobs)
                text = seen.text(len(queue.jobs))
                bar.update(task, description=text, completed=seen.done, total=seen.total, left=seen.left)
                _pause(WAIT[kind] if going else 0.0)
        except KeyboardInterrupt:
            queue.cancel()
            raise
    return queue.states


class _Queue:
    """The cells that wait and those that run."""

    def __init__(
        self,
        record: Record,
        cells: Sequence[Cell],
        executor: Any,
        kind: str,
        jobs: int,
        console: Console,
        threads: int | None,
    ) -> None:
        self.record, self.executor, self.kind, self.size, self.console = record, executor, kind, jobs, console
        self.states = {cell.folder: record.state(cell) for cell in cells}
        self.waiting = [cell for cell in cells if self.states[cell.folder].state != "finished"]
        self.jobs: dict[int, tuple[Cell, Any]] = {}  # by slot
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
        self.devices = _devices() if kind != "slurm" else []

    def step(self) -> bool:
        """Collect ended jobs, submit new ones, and return whether cells are left."""
        for slot, (cell, job) in list(self.jobs.items()):
            if job.done():
                del self.jobs[slot]
                self._ended(cell, job)
        for cell in list(self.waiting):
            if len(self.jobs) >= self.size:
                break
            if is_locked(self.record.folder(cell)):  # another study runs it
                continue
            first = self.states.get(cell.after) if cell.after else None
            if first is not None and first.state in ("failed", "interrupted") and not self._is_queued(cell.after):
                self._end(cell, State("failed", f"{cell.after} did not finish"))
            elif first is None or first.state == "finished":
                self._start(cell)
        return bool(self.waiting or self.jobs)

    def cancel(self) -> None:
        """Cancel the jobs and wait for their ends."""
        for _, job in self.jobs.values():
            job.cancel()
        until = time.monotonic() + (CANCELED if self.kind == "local" else 0.0)
        while time.monotonic() < until and any(
            not job.done() or is_locked(self.record.folder(cell)) for cell, job in self.jobs.values()
        ):
            time.sleep(0.1)

    def _is_queued(self, folder: str | None) -> bool:
        return any(cell.folder == folder for cell in (*self.waiting, *(cell for cell, _ in self.jobs.values())))

    def _start(self, cell: Cell) -> None:
        before = self.record.state(cell)
        self.waiting.remove(cell)
        if before.state == "finished":  # meanwhile, by another study
            self.states[cell.folder] = before
            return
        slot = next(number for number in range(self.size) if number not in self.jobs)
        env = {} if self.kind == "slurm" else {"OMP_NUM_THREADS": str(self.threads)}
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        folder = self.record.folder(cell).absolute()
        call = Launch(PROGRAM, str(folder), tuple(cell.command(self.record.root)), os.getcwd(), env)
        self.states[cell.folder] = State("running", attempts=before.attempts + 1)
        self.console.print(f"{'resumes' if before.attempts else 'starts'}: {escape(cell.folder)}", soft_wrap=True)
        with _stderr_to(self.record.root / "jobs" / "submitit.log"), _interruptible():
            self.jobs[slot] = cell, self.executor.submit(call)

    def _ended(self, cell: Cell, job: Any) -> None:
        after = self.record.state(cell)
        if after.state == "running":  # another study has started it meanwhile, and is awaited
            self.states[cell.folder] = after
            self.waiting.insert(0, cell)
            return
        if after.state in ("not run", "interrupted"):
            lines = (job.stderr() or "").strip().splitlines()
            after = State("interrupted", after.reason or (lines[-1] if lines else "the job ended"), after.attempts)
        self._report(cell, after)

    def _end(self, cell: Cell, after: State) -> None:
        self.waiting.remove(cell)
        self._report(cell, after)

    def _report(self, cell: Cell, after: State) -> None:
        self.states[cell.folder] = after
        reason = f" ({after.reason})" if after.reason else ""
        self.console.print(f"{after.state}: {escape(cell.folder + reason)}", soft_wrap=True)


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Let processes that are started meanwhile write their errors to a file; submitit's print a traceback when canceled."""
    kept = os.dup(2)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let processes that are started meanwhile end on SIGINT, which cancels submitit's local jobs.

    A process that ignores SIGINT, as in the background of a shell, passes this on to those that it starts.
    """
    ignored = (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    )
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _devices() -> list[str]:
    """Return the GPUs that are visible here; the local executor hides them from its jobs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part for part in given.split(",") if part]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
