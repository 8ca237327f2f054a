"""``python -m benchmarks.neighbors``: time and memory of the neighbor search of RRL, MOIT and Sel-CL by number of samples.

Each size runs in a process of its own, with one thread. The first ``--queries`` samples search among all samples, and their
neighbors vote twice; the processor seconds are scaled to all samples. Memory is measured during this; that of the neighbors of
all samples is computed.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.million import peak

SIZES = [(12_500, 512), (25_000, 512), (50_000, 512), (50_000, 128), (100_000, 128), (1_000_000, 128)]
K, CLASSES = 250, 10


def measure(samples: int, width: int, queries: int) -> dict[str, Any]:
    """Search in this process; return processor seconds, and bytes above those of the features."""
    import torch
    from torch.nn.functional import one_hot

    from sanm_lightning.functional import neighbor_mean, similar_samples

    torch.set_num_threads(1)
    torch.manual_seed(0)
    features = torch.randn(samples, width)
    labels = one_hot(torch.arange(samples) % CLASSES).float()
    before, rows = peak(), min(queries, samples)
    began = time.process_time()
    positions, similarity = similar_samples(features, K, first=rows)
    searched = time.process_time()
    for _ in range(2):
        neighbor_mean(labels, positions, (similarity / 0.1).exp())
    voted, scale = time.process_time(), samples / rows
    return {
        "samples": samples, "width": width, "queries": rows, "measured_seconds": round(voted - began, 2),
        "search_seconds": round((searched - began) * scale, 1), "vote_seconds": round((voted - searched) * scale, 1),
        "peak_gb": round((peak() - before) / 1e9, 2), "features_gb": round(samples * width * 4 / 1e9, 3),
        "neighbors_gb": round(samples * K * 12 / 1e9, 2),
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--one", type=int, nargs=2, help="measure one size in this process")
    parser.add_argument("--output", type=Path, default=Path("results/neighbors.json"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.queries)))
        sys.exit()
    runs = []
    for samples, width in SIZES:
        words = ["--one", str(samples), str(width), "--queries", str(options.queries)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.neighbors", *words], capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(runs[-1], flush=True)
    options.output.write_text(
        json.dumps({"machine": platform.processor() or platform.machine(), "k": K, "runs": runs}, indent=1)
    )
