"""Peak memory of an audit of N images after decoding, on synthetic features: neighbors, probe, noise model.

    python benchmarks/audit_memory.py [--images 100000] [--features 1280] [--classes 10]

Features are those of a memory-mapped file, as in ``sanm audit``. Prints the seconds of each step, and the peak memory of the
process before and after.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch

from sanm_lightning.audit import AuditSet
from sanm_lightning.audit.features import FeatureTable
from sanm_lightning.audit.run import audit_features


def peak_gib() -> float:
    """Return the peak memory of the process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synthetic(folder: Path, images: int, features: int, classes: int) -> tuple[AuditSet, FeatureTable]:
    """Return Gaussian classes in a memory-mapped file, of which 20 % of the samples have another label."""
    draw = np.random.default_rng(0)
    table = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (images, features))
    true = np.arange(images) % classes
    centers = draw.normal(size=(classes, features), scale=0.15)
    for start in range(0, images, 1024):
        rows = slice(start, min(start + 1024, images))
        table[rows] = centers[true[rows]] + draw.normal(size=table[rows].shape)
    labels = np.where(draw.random(images) < 0.2, draw.integers(0, classes, images), true)
    names = [f"{row}.jpg" for row in range(images)]
    data = AuditSet(names, labels, [str(c) for c in range(classes)], ["train"] * images, names)
    digests = draw.integers(0, 256, (images, 16), dtype=np.uint8)
    thumbs = draw.integers(0, 256, (images, 16, 16, 3), dtype=np.uint8)
    return data, FeatureTable(table, digests, thumbs, {})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data, table = synthetic(Path(folder), options.images, options.features, options.classes)
        before = peak_gib()
        summary = audit_features(data, table).summary
    kept = {key: summary[key] for key in ("noise_rate", "interval", "weight_decay", "seconds")}
    print(json.dumps({**vars(options), "gib_before": round(before, 2), "gib": round(peak_gib(), 2), **kept}))


if __name__ == "__main__":
    main()
