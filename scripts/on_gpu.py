"""Check what only a GPU can show, and write small JSON files: ``python scripts/on_gpu.py --root CIFAR10_FOLDER``.

Parts: ``correctness``, ``speed`` and ``training``, each in a process of its own and with its own file in ``--out``. See
``docs/on-gpu.md``. ``--device cpu --tiny`` runs everything that does not need CUDA in minutes.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.gpu.options import PARTS, parse  # noqa: E402  # after the path

GRACE = 60
"""Seconds after its deadline in which a part may end by itself."""


def run_part(part: str, options: Namespace, deadline: float) -> str | None:
    """Run a part in a process of its own, and return why it did not end by itself; None if it did."""
    words = [*sys.argv[1:], "--out", str(options.out), "--deadline", str(deadline)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the benchmarks choose the device by themselves
    command = [sys.executable, "-m", f"scripts.gpu.{part}", *words]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        status = process.wait(max(0.0, deadline - time.time()) + GRACE)
    except subprocess.TimeoutExpired:
        return f"stopped {GRACE} seconds after its time was used up"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it started
        process.wait()
    return None if status == 0 else f"ended with exit status {status}"


def summary(part: str, out: Path, reason: str | None) -> Counter[str]:
    """Print what a part did not do and what failed; return the number of checks by status."""
    path = out / f"{part}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"checks": {}}
    counts = Counter(entry["status"] for entry in content["checks"].values())
    print(
        f"{part}: {', '.join(f'{number} {status}' for status, number in sorted(counts.items())) or 'nothing'} ({path})"
    )
    for name, entry in content["checks"].items():
        if entry["status"] in ("failed", "error", "not run"):
            print(f"  {entry['status']}: {name}: {entry.get('reason', 'outside the tolerance')}")
    if reason is not None:
        print(f"  {part} {reason}")
        counts["error"] += 1
    return counts


def main() -> int:
    """Run the parts; return 1 if a check failed or raised an error."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # stops the running part, too
    end, total = time.time(), Counter[str]()
    whole = sum(PARTS[part] for part in options.parts)
    reasons: dict[str, str | None] = {}
    for part in options.parts:
        end += options.budget * PARTS[part] / whole
        (options.out / f"{part}.json").unlink(missing_ok=True)
        reasons[part] = run_part(part, options, end)
    for part, reason in reasons.items():
        total += summary(part, options.out, reason)
    return int(total["failed"] + total["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
