"""Every example runs, for an epoch on a few digits, and prints its one line."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers")


@pytest.mark.parametrize("name", ["plain_loop", "mixin", "callback"])
def test_runs_and_prints_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](epochs=1, samples=100)
    assert 0 <= accuracy <= 1
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_cluster_job_runs_one_command_in_one_directory_at_every_launch(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_NAME": "sanm", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    job = ["bash", str(EXAMPLES / "slurm" / "train.sbatch"), "--config", "a b.yaml"]
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said, command = subprocess.run(job, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said == "run directory runs/sanm-7"
    assert command == (
        "sanm fit --config a b.yaml --trainer.default_root_dir runs/sanm-7 --trainer.num_nodes 2 --trainer.devices 4 "
        "--trainer.accelerator gpu --trainer.strategy ddp --ckpt_path auto"
    )
