"""Kill runs with SIGKILL at random moments, resume each from its last checkpoint, and compare with an uninterrupted run.

    python tests/kill_and_resume.py [--kills 20] [--kills-of-two 5] [--methods CrossEntropy ...] [--small] [--seed 0]

Not collected as a test; ``test_kill_and_resume.py`` runs the small version. Everything must be equal bit for bit: weights,
banks, optimizer, random streams, ``results.json`` but for ``seconds``, and the samples of every step, so that no sample is
seen twice in an epoch. Needs a system that forks. Runs of one process are forked from this one, after the imports; runs of two
are what a user types.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
import yaml

METHODS: dict[str, tuple[bool, dict[str, Any]]] = {  # under SANM?, options
    "CrossEntropy": (True, {}),
    "CoTeaching": (True, {"noise_rate": 0.4, "num_gradual": 2}),
    "ELRPlus": (False, {"ema_ramp_steps": 20}),
    "DivideMix": (True, {"ramp_epochs": 1.0}),
    "SSR": (True, {"k": 10}),
}
CHOOSING = ("DivideMix", "SSR")
"""Methods that draw their samples themselves, some of them several times in an epoch."""
DIGITS = {"class_path": "Digits", "init_args": {"image_size": 8, "batch_size": 64}}
TOY = {"class_path": "Toy", "init_args": {"num_samples": 44, "batch_size": 8}}


class Trace(L.Callback):
    """Note the samples of every step, and save the end of the run."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        line = json.dumps([trainer.global_step, trainer.current_epoch, batch.index.tolist()])
        with open(f"trace{trainer.global_rank}.jsonl", "a") as file:
            file.write(line + "\n")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.save_checkpoint("final.ckpt")


def config(method: str, data: dict[str, Any], epochs: int, processes: int) -> dict[str, Any]:
    """The run, as a file for ``sanm fit``: checkpoints in mid-epoch, at the last step of an epoch, and at its end."""
    under_sanm, options = METHODS[method]
    sanm = {"sanm": {"class_path": "SANM", "init_args": {"mu": 0.5}}} if under_sanm else {}
    network = {"network": "small_cnn", "network_args": {"width": 8}, "warmup_epochs": 1}
    saving = {"dirpath": "kept", "auto_insert_metric_name": False}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {**saving, "filename": "s{step}", "every_n_train_steps": 3}},
        {"class_path": "ModelCheckpoint", "init_args": {**saving, "filename": "e{epoch}"}},
        {"class_path": "kill_and_resume.Trace"},
    ]
    noise = {"noise": {"kind": "symmetric_exclusive", "rate": 0.4}}
    return {
        "seed_everything": 3,
        "model": {"class_path": method, "init_args": {**network, **options, **sanm}},
        "data": {**data, "init_args": {**data["init_args"], **noise}},
        "trainer": {
            "accelerator": "cpu", "deterministic": True, "max_epochs": epochs, "logger": False, "callbacks": callbacks,
            "enable_progress_bar": False, "enable_model_summary": False,
            **({"devices": processes, "strategy": "ddp"} if processes > 1 else {"devices": 1}),
        },
    }  # fmt: skip


class Launch:
    """One life of a run, in its folder."""

    def __init__(self, folder: Path, processes: int, ckpt_path: Path | None) -> None:
        words = ["fit", "--config", "run.yaml", *(["--ckpt_path", str(ckpt_path)] if ckpt_path else [])]
        if processes == 1:
            self.pid = os.fork()
            if self.pid == 0:
                self._live(folder, words)
        else:
            here = Path(__file__).parent
            path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
            command = [sys.executable, "-W", "ignore", "-m", "sanm_lightning", *words]
            with open(folder / "log.txt", "a") as log:
                environment = {**os.environ, "PYTHONPATH": path}
                self.process = subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.pid = self.process.pid
        self.processes = processes

    @staticmethod
    def _live(folder: Path, words: list[str]) -> None:
        from sanm_lightning.cli import main

        status = 1
        try:
            os.setsid()
            os.chdir(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.argv = ["sanm"]
            main(words)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself, with success, before the time was over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                if status != 0:
                    raise RuntimeError("the run failed, see its log.txt")
                return True
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """No goodbye, to no process of it."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that has its name; drafts have another."""
    kept = sorted((folder / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return kept[-1] if kept else None


def written(folder: Path) -> int:
    """Bytes of the first process's trace."""
    trace = folder / "trace0.jsonl"
    return trace.stat().st_size if trace.exists() else 0


def steps(folder: Path, processes: int) -> list[dict[int, tuple[int, list[int]]]]:
    """For each process, epoch and samples of every step; a step that is taken again must have the same."""
    out = []
    for rank in range(processes):
        taken: dict[int, tuple[int, list[int]]] = {}
        for line in (folder / f"trace{rank}.jsonl").read_text().splitlines():
            try:
                step, epoch, index = json.loads(line)
            except json.JSONDecodeError:
                continue  # killed while writing it
            assert taken.setdefault(step, (epoch, index)) == (epoch, index), f"step {step} was repeated with others"
        out.append(taken)
    return out


def equal(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of what differs."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and one.numpy().tobytes() == other.numpy().tobytes() else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{name} keys"]
        return [found for key in one for found in equal(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [found for i, (a, b) in enumerate(zip(one, other, strict=True)) for found in equal(a, b, f"{name}[{i}]")]
    return [] if one == other else [name]


def compare(method: str, whole: Path, killed: Path, processes: int) -> None:
    """All that must be equal."""
    ends = [torch.load(folder / "final.ckpt", weights_only=True) for folder in (whole, killed)]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "method", "epoch", "global_step", "settings"):
        differing = equal(ends[0][part], ends[1][part], part)
        assert not differing, differing[:5]
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, killed)]
    for result in results:
        assert result.pop("seconds") > 0 and result.pop("timing")
    assert results[0] == results[1]
    once, again = steps(whole, processes), steps(killed, processes)
    assert once == again
    epochs: dict[int, list[int]] = {}
    for taken in again:
        for epoch, index in taken.values():
            epochs.setdefault(epoch, []).extend(index)
    for seen in (
        epochs.values() if method not in CHOOSING else ()
    ):  # over two processes one sample may fill the last place
        assert len(seen) - len(set(seen)) <= processes - 1, "a sample was seen twice in an epoch"


def torture(method: str, kills: int, processes: int, data: dict[str, Any], epochs: int, draw: random.Random) -> str:
    """Kill as often as asked, over as many runs as that takes; return the figures."""
    place = Path(tempfile.mkdtemp(prefix="kill_and_resume_"))

    def begin(name: str) -> Path:
        folder = place / name
        folder.mkdir()
        (folder / "run.yaml").write_text(yaml.safe_dump(config(method, data, epochs, processes)))
        return folder

    whole = begin("whole")
    started = time.monotonic()
    life = Launch(whole, processes, None)
    while not written(whole):
        life.wait(0.01)
    learning = time.monotonic()
    if not life.wait(1800):
        raise RuntimeError("the uninterrupted run takes too long")
    length, learned = time.monotonic() - started, time.monotonic() - learning
    first = time.monotonic()
    done, runs, from_checkpoint, drafts = 0, 0, 0, 0
    while done < kills:
        runs += 1
        killed = begin(f"killed{runs}")
        while True:
            found = last_checkpoint(killed)
            before, life = written(killed), Launch(killed, processes, found)
            # Most lives end before the run does; a life must be long enough to reach the next checkpoint now and then.
            moment = draw.uniform(0.05, 1.0) * (length if processes == 1 else learned)
            if processes > 1 and done < kills:  # starting them takes most of the time: count from the first step
                while written(killed) == before and not (ended := life.wait(0.01)):
                    pass
                if ended:
                    break
            if life.wait(moment if done < kills else 1800):
                break
            life.kill()
            done += 1
            from_checkpoint += last_checkpoint(killed) is not None
            drafts += len(list(killed.rglob("*.tmp")))
        compare(method, whole, killed, processes)
    shutil.rmtree(place)
    return (
        f"{method}, {processes} process(es): {done} kills over {runs} runs, {from_checkpoint} of them with a checkpoint and "
        f"{drafts} with a draft, all equal; uninterrupted {length:.1f} s, all of it {time.monotonic() - first:.0f} s"
    )


def main() -> None:
    """Parse arguments, run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills-of-two", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="toy data instead of digits")
    options = parser.parse_args()
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    import kill_and_resume  # noqa: F401  (the runs name a callback of it)

    import sanm_lightning.cli  # noqa: F401  (once, before the forks)

    for method in options.methods:
        for processes, kills in ((1, options.kills), (2, options.kills_of_two)):
            if kills:
                draw = random.Random(f"{options.seed} {method} {processes}")
                print(
                    torture(method, kills, processes, TOY if options.small else DIGITS, options.epochs, draw),
                    flush=True,
                )


if __name__ == "__main__":
    main()
