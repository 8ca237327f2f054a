"""Run one cell in a process of its own; what submitit pickles and starts. Only the standard library is imported."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sanm_lightning.study.state import LOCK, State, read_state, write_state

__all__ = ["Launch", "last_line"]

PATIENCE = 0.5
"""Seconds between the request to a process to end and its end."""


@dataclass(frozen=True)
class Launch:
    """Run a command of ``sanm`` in a run folder, from its last checkpoint if there is one.

    Args:
        program: the program ``sanm``.
        folder: absolute run folder.
        command: arguments of ``sanm``.
        cwd: working directory.
        env: environment variables to be set.
    """

    program: tuple[str, ...]
    folder: str
    command: tuple[str, ...]
    cwd: str
    env: dict[str, str]

    def __call__(self) -> str:
        """Run the command, unless it is finished or another process runs it, and return the state of the cell."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return "running"
            before = read_state(folder)
            if before.state == "finished":
                return before.state
            attempts = before.attempts + 1
            write_state(folder, State("running", attempts=attempts))
            code = self._run(folder, lock.fileno())
            if code == 0:
                after = State("finished", attempts=attempts)
            else:
                killed = f"killed by signal {-code}" if code < 0 else ""
                reason = killed or last_line(folder / "log.txt")
                after = State("interrupted" if killed else "failed", reason, attempts)
            write_state(folder, after)
            return after.state

    def _run(self, folder: Path, lock: int) -> int:
        """Return the exit status. The process inherits the lock, and ends with this one, unless this one is killed."""
        resume = ["--ckpt_path", "last"] if any((folder / "checkpoints").glob("*.ckpt")) else []
        with (folder / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [*self.program, *self.command, *resume],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=self.cwd, env={**os.environ, **self.env},
                start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
            try:
                return child.wait()
            finally:
                _end(child)

    def checkpoint(self) -> Any:
        """Return the same job for submitit, which requeues it when SLURM preempts it or its time is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a process that is still running, with its workers."""
    if child.poll() is not None:
        return
    for request in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, request)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)


def last_line(log: Path) -> str:
    """Return the last line of the error in a log: that of the sentence or of the traceback.

    Args:
        log: standard output and error of a command.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("(SANM_TRACEBACK=1")]
    return lines[-1].removeprefix("sanm: ") if lines else "no output"
