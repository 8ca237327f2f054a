"""Peak memory of the steps of an audit, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sanm_lightning
from tests.full import FULL

STATUS = Path("/proc/self/status")
PROGRAM = """
import numpy as np, torch
from sanm_lightning.functional import nearest_neighbors
from sanm_lightning.functional.linear_probe import linear_probe

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def search(table):
    nearest_neighbors(torch.from_numpy(table), 5, chunk=64)

def probe(table):
    labels, folds = np.arange(len(table)) % 2, np.arange(len(table)) % 5
    linear_probe(table, labels, folds, 2, weight_decays=[5.0], selection_size=500, overwrite_features=True)

kept, draw = [], np.random.default_rng(0)
for step, size, width, few in ((search, 1_200, 16_384, 200), (probe, 240_000, 128, 9_000)):
    step(draw.standard_normal((few, width), np.float32))  # what libraries and blocks of rows take
    kept.append(draw.standard_normal((size, width), np.float32))
    before = peak()
    step(kept[-1])
    print((peak() - before) / kept[-1].nbytes)
"""


@pytest.mark.skipif(not FULL, reason="make test-all")
@pytest.mark.skipif(
    not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the system reports no peak memory"
)
def test_neighbors_and_probe_make_no_copy_of_the_features() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sanm_lightning.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    neighbors, probe = map(float, done.stdout.split())
    assert neighbors < 0.5
    assert probe < 0.5
