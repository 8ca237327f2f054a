"""Runs of ``sanm`` commands that several processes share, for the studies in this folder."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any


def sanm(*words: str, log: Path) -> None:
    """Run a command line in a process of its own, on one thread."""
    with log.open("w") as out:
        command = [sys.executable, "-m", "sanm_lightning", *words]
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        ).returncode
    if code:
        raise SystemExit(f"expected the command to succeed, got exit status {code}; see {log}")


def folder_options(folder: Path) -> list[str]:
    """Return the options for the folder of a ``sanm fit``; an interrupted run is continued from its last checkpoint."""
    return ["--trainer.default_root_dir", str(folder), "--ckpt_path", "auto"]


@contextmanager
def reserved(run: Path) -> Iterator[bool]:
    """Lock a file beside a run while the block runs; False if another process has locked it. A killed process frees it."""
    with run.with_name(f"{run.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


@contextmanager
def awaited(run: Path) -> Iterator[None]:
    """Reserve a run while the block runs, as soon as no other process has reserved it."""
    while True:
        with reserved(run) as free:
            if free:
                yield
                return
        time.sleep(0.2)


def in_turn(jobs: int, runs: Iterable[Callable[[], None]]) -> list[str]:
    """Start the runs in their order, at most ``jobs`` at once; return the errors of those that fail."""

    def error(run: Callable[[], None]) -> str | None:
        try:
            run()
        except SystemExit as failure:
            print(failure, flush=True)
            return str(failure)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        return [found for found in pool.map(error, runs) if found is not None]


def recorded(file: Path) -> dict[str, Any]:
    """Return the runs of a results file."""
    found: dict[str, Any] = json.loads(file.read_text())["runs"] if file.exists() else {}
    return found


def record(file: Path, study: dict[str, Any], keys: tuple[str, ...], result: dict[str, Any]) -> None:
    """Add a run to a results file, while other processes wait.

    Args:
        file: JSON file.
        study: what a new file says about all runs.
        keys: path of the run in ``runs``.
        result: results of the run.
    """
    with awaited(file):
        content = json.loads(file.read_text()) if file.exists() else {**study, **machine(), "runs": {}}
        place = content["runs"]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = {"commit": commit(), **result}
        draft = file.with_name(f"{file.name}.tmp")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(draft, file)


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per run",
        "versions": {name: version(name) for name in ("torch", "torchvision", "lightning", "timm")},
    }


def commit() -> str:
    """Return the commit of the code."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def decimals(value: float) -> str:
    """Format an accuracy with three decimals, without the leading zero."""
    return f"{value:.3f}".removeprefix("0")
