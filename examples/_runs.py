"""Runs of ``sanm`` commands that several processes share, for the studies in this folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sanm(*words: str, log: Path) -> None:
    """Run a command line in a process of its own, on one thread."""
    with log.open("w") as out:
        command = [sys.executable, "-m", "sanm_lightning", *words]
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if code:
        raise SystemExit(f"expected the command to succeed, got exit status {code}; see {log}")


@contextmanager
def reserved(run: Path) -> Iterator[bool]:
    """Reserve a run with a lock file beside it while the block runs; False if another process has reserved it."""
    lock = run.with_name(f"{run.name}.lock")
    try:
        lock.open("x").close()
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink()


def commit() -> str:
    """Return the commit of the code."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def decimals(value: float) -> str:
    """Format an accuracy with three decimals, without the leading zero."""
    return f"{value:.3f}".removeprefix("0")
