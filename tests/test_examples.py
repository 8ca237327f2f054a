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
def test_the_cluster_job_begins_once_and_then_goes_on(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_NAME": "sanm", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}

    def submit() -> list[str]:
        job = ["bash", str(EXAMPLES / "slurm" / "train.sbatch"), "--config", "a b.yaml"]
        environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(job, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()

    said, command = submit()
    assert said == "run directory runs/sanm-7: no checkpoint, begins at epoch 0"
    assert command == (
        "sanm fit --config a b.yaml --trainer.default_root_dir runs/sanm-7 --trainer.num_nodes 2 --trainer.devices 4 "
        "--trainer.accelerator gpu --trainer.strategy ddp"
    )
    checkpoint = Path("runs/sanm-7/lightning_logs/version_0/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    said, again = submit()
    assert said == "run directory runs/sanm-7: --ckpt_path last"
    assert again == f"{command} --ckpt_path last"
