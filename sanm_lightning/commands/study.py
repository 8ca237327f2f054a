"""``sanm study``: run the cells of a study file, several at once, and list what failed."""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.command_line.sentences import INTERRUPTED
from sanm_lightning.safe_files import require_folder
from sanm_lightning.study.cells import Cell, cells_of
from sanm_lightning.study.cost import forward_passes
from sanm_lightning.study.options import check_options
from sanm_lightning.study.published import read_published
from sanm_lightning.study.record import Record
from sanm_lightning.study.run import run_cells, submitit_executor
from sanm_lightning.study.schema import read_study

__all__ = ["main", "study"]


def study(
    file: str,
    out: str | None = None,
    executor: Literal["local", "slurm", "debug"] = "local",
    jobs: int = 1,
    threads: int | None = None,
    slurm: dict[str, Any] | None = None,
    data_root: str | None = None,
    dry_run: bool = False,
) -> int:
    """Run each cell of a study as a fit in its own process and folder; the same command continues an interrupted study.

    Finished cells are skipped, and interrupted and failed ones start again from their last checkpoint. A failed cell does
    not stop the others; failed cells are listed at the end.

    Args:
        file: study file, such as ``configs/studies/smoke.yaml``.
        out: folder of the study. Default: ``runs/studies/<name of the file>``.
        executor: submitit's executor: processes of this machine, jobs of SLURM, or one after another in this process.
        jobs: number of cells that run at once.
        threads: threads of each cell. Default: the processors of this machine, divided by jobs.
        slurm: parameters of ``submitit.AutoExecutor``, such as ``--slurm.slurm_partition gpu --slurm.gpus_per_node 1``.
        data_root: ``--data.root`` of all cells.
        dry_run: print the cells, their commands and their cost in forward passes, and run nothing.

    Returns:
        Exit status: 0 if all cells are finished, 1 if some failed, 130 if the study was interrupted.

    Raises:
        ValueError: if the study or an option is invalid, or cells were run with other settings.
        OSError: if the file does not exist or the folder cannot be written.
        ModuleNotFoundError: if submitit is not installed.
    """
    if jobs < 1 or (threads is not None and threads < 1):
        raise ValueError(f"expected 1 or more jobs and threads, got {jobs} and {threads}; choose larger numbers")
    read = read_study(_existing(file))
    if read.published is not None:
        read_published(read.published)
    cells = cells_of(read, data_root)
    check_options(read.name, cells)
    record, console = Record(out or Path("runs", "studies", read.name)), Console(highlight=False)
    listed = record.with_earlier(read.name, cells)
    if dry_run:
        _print_cells(console, record, cells)
        return 0
    require_folder(record.root)
    runner = submitit_executor(executor, record.root / "jobs", slurm or {})
    record.write(read.name, read.published, listed)
    try:
        states = run_cells(record, cells, runner, executor, jobs, console, threads)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues", soft_wrap=True)
        return INTERRUPTED
    counts = Counter(state.state for state in states.values())
    console.print(", ".join(f"{number} {state}" for state, number in sorted(counts.items())))
    for folder, state in states.items():
        if state.state != "finished":
            console.print(f"{state.state}: {record.root / folder}: {escape(state.reason)}", soft_wrap=True)
    console.print(f"next: sanm table {record.root}", soft_wrap=True)
    return 0 if counts["finished"] == len(states) else 1


def _existing(file: str) -> str:
    """Return the path of a study: a file, or one of the package."""
    from sanm_lightning.command_line.config_paths import packaged

    inside = packaged() / file
    return str(inside) if not Path(file).is_file() and inside.is_file() else file


def _print_cells(console: Console, record: Record, cells: list[Cell]) -> None:
    """Print state, cost and command of each cell."""
    total, unknown = 0.0, 0
    passes = forward_passes(cells, console)
    for cell in cells:
        cost = passes.get(cell.folder)
        total, unknown = total + (cost or 0.0), unknown + (cost is None)
        shown = "cost unknown" if cost is None else f"{cost:.3g} forward passes"
        console.print(f"{escape(cell.folder)}: {record.state(cell).state}, {shown}", soft_wrap=True)
        console.print(f"  sanm {escape(shlex.join(cell.command(record.root)))}", soft_wrap=True)
    more = f", and {unknown} of unknown cost" if unknown else ""
    console.print(f"{len(cells)} cells, {total:.3g} forward passes of one image{more}")


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm study``, run it and return the exit status."""
    parser = CommandParser(prog="sanm study", description="Run the cells of a study file, several at once.")
    parser.add_argument("file", type=str, help="study file, such as configs/studies/smoke.yaml")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print cells, commands and cost; run nothing"
    )
    parser.add_function_arguments(study, skip={"file", "dry_run"}, as_group=False)
    return study(**parser.parse_args(words).as_dict())
