"""Run checks one after the other, and write their results to a JSON file after each of them."""

import argparse
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import timm
import torch
import torchvision

from sanm_lightning import __version__
from sanm_lightning.run.record import write_json

NOT_RUN = "not run"
REPOSITORY = Path(__file__).parents[2]


class Check(NamedTuple):
    """A check, or a measurement.

    Attributes:
        name: name in the JSON file, such as ``step/ELR``.
        run: function that returns figures; ``passed``, if it is among them, says whether the check passed.
        needs_cuda: whether the check is listed as not run without CUDA.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    needs_cuda: bool = False


def run_checks(part: str, checks: Sequence[Check], options: argparse.Namespace) -> dict[str, Any]:
    """Run the checks of a part until its deadline; an exception in one check does not stop the others.

    Args:
        part: name of the part and of its JSON file.
        checks: the checks in their order.
        options: see :mod:`scripts.gpu.options`.

    Returns:
        Content of the JSON file: the header, and an entry per check with ``status`` (``passed``, ``failed``, ``measured``,
        ``error`` or ``not run``), ``seconds``, and figures or a ``reason``.
    """
    chosen = [check for check in checks if not options.only or check.name.startswith(tuple(options.only))]
    found: dict[str, Any] = {check.name: {"status": NOT_RUN, "reason": "not reached"} for check in chosen}
    content = {**header(options), "checks": found}
    path = options.out / f"{part}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    for check in chosen:
        found[check.name] = outcome(check, options)
        print(f"{part} {check.name}: {line(found[check.name])}", flush=True)
        write_json(path, content)
    return content


def outcome(check: Check, options: argparse.Namespace) -> dict[str, Any]:
    """Return the entry of a check, which is run unless it needs another device or more time."""
    if check.needs_cuda and options.device != "cuda":
        return {"status": NOT_RUN, "reason": "expected a CUDA device, got cpu"}
    if time.time() > options.deadline:
        return {"status": NOT_RUN, "reason": "the time of this part was used up"}
    start = time.perf_counter()
    try:
        found = check.run()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "site-packages" not in frame.filename]  # the others are those of libraries
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        entry = {"status": "error", "reason": plain(f"{type(error).__name__}: {error} ({where})")}
    else:
        passed = found.pop("passed", None)
        status = "measured" if passed is None else "passed" if passed else "failed"
        entry = {"status": found.pop("status", status), **plain(found)}
    return {**entry, "seconds": round(time.perf_counter() - start, 2)}


def plain(value: Any) -> Any:
    """Convert figures to what JSON can hold: numbers of five digits, names of infinite numbers, paths in the repository."""
    if isinstance(value, str):
        return value.replace(f"{REPOSITORY}/", "").replace(str(Path.home()), "~")
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def line(entry: dict[str, Any]) -> str:
    """Return an entry as one line."""
    return ", ".join(f"{name} {value}" if name != "status" else str(value) for name, value in entry.items())


def header(options: argparse.Namespace) -> dict[str, Any]:
    """Return machine, versions, command and commit."""
    on_cuda = options.device == "cuda"
    card = torch.cuda.get_device_properties(0) if on_cuda else None
    return {
        "device": card.name if card else platform.processor() or platform.machine(),
        "device_memory_bytes": card.total_memory if card else None,
        "device_capability": f"{card.major}.{card.minor}" if card else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda if on_cuda else None, "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "torchvision": torchvision.__version__, "lightning": lightning.__version__, "timm": timm.__version__,
        "sanm_lightning": __version__, "commit": commit(), "tiny": options.tiny, "budget_seconds": options.budget,
        "command": command(sys.argv[1:]),
    }  # fmt: skip


def command(words: Sequence[str]) -> str:
    """Return the command without the folders of this machine."""
    own = ("--root", "--out", "--work", "--deadline")
    kept = [word for before, word in zip(["", *words], words, strict=False) if word not in own and before not in own]
    return " ".join(["python scripts/on_gpu.py", *kept])


def commit() -> str | None:
    """Return the commit of the code, with ``+`` if files were changed; None outside a git repository."""

    def git(*words: str) -> str:
        place = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
