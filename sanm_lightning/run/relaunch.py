"""Resume a run: find the checkpoint of ``--ckpt_path last`` or ``auto`` and continue in its run directory."""

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["ContinueRun", "resolve_ckpt_path"]


class _Found(NamedTuple):
    """A checkpoint file; the last one of a list is the newest.

    Attributes:
        rank: position of its run among all runs, from the oldest; 0 for runs without a number, -1 without runs.
        step: number of optimizer steps; infinite for a damaged file, which is then read and raises an error.
        time: modification time in nanoseconds, which copying a run may change.
        path: the file.
        run: its run directory; None without runs.
    """

    rank: int
    step: float
    time: int
    path: Path
    run: Path | None


def resolve_ckpt_path(trainer: Any, asked: str | None, fitting: bool = True) -> str | None:
    """Resolve ``last``, ``auto`` or ``hpc`` to a file, and continue in the run directory of that checkpoint.

    ``last`` is the checkpoint with the most optimizer steps in the newest run: the run with the highest version number
    that has checkpoints; among all runs, if their names are not numbered, such as the ids of ``WandbLogger``. Times of files
    are compared last, because a copy changes them. Searched are the directories that this trainer writes to, with their
    subdirectories: those of every ``ModelCheckpoint``, those of all runs of its logger
    (``lightning_logs/version_*/checkpoints``), and the files saved on a SLURM signal (``hpc_ckpt_*.ckpt``). ``hpc`` is the
    last of the latter. ``auto`` is ``last`` if there is a checkpoint, and otherwise a new run. For ``last``, Lightning
    searches the directory of the new run only, and trains from scratch if it is empty.
    A Lightning logger with numbered runs continues in the run of the checkpoint, see :class:`ContinueRun`.

    Args:
        trainer: a trainer that has not run yet.
        asked: value of ``--ckpt_path``. Values other than ``last``, ``auto`` and ``hpc`` are returned unchanged; None
            under SLURM means ``hpc`` if such a file exists, as in Lightning.
        fitting: whether the run is a fit; an evaluation writes to a new run directory.

    Returns:
        Path of the checkpoint; None for a new run.

    Raises:
        MisconfigurationException: if there is no checkpoint for ``last`` or ``hpc``, with a list of the searched
            directories; or for ``auto`` in an evaluation.
    """
    if asked == "auto" and not fitting:
        raise MisconfigurationException(
            "expected --ckpt_path FILE or last for an evaluation, got auto, which may start from random weights; use "
            "--ckpt_path last"
        )
    root = Path(trainer.default_root_dir)
    signalled = sorted(root.glob("hpc_ckpt_*.ckpt"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    if asked is None and signalled and SLURMEnvironment.detect():
        asked = "hpc"
    if asked not in ("last", "auto", "hpc"):
        return asked
    runs = _runs(trainer)
    given = [
        Path(part.dirpath)
        for part in trainer.checkpoint_callbacks
        if isinstance(part, ModelCheckpoint) and part.dirpath
    ]
    if asked == "hpc":
        searched, files = [root], signalled[-1:]
    else:
        searched = [*given, *(run / "checkpoints" for run in runs or [_folder(trainer) / "*"]), root]
        files = [path for folder in searched[:-1] for path in folder.rglob("*.ckpt")] + signalled
    places = ", ".join(dict.fromkeys(repr(str(folder)) for folder in searched))
    if not files and asked == "auto":
        rank_zero_info(f"--ckpt_path auto: no checkpoint in {places}; starting at epoch 0")
        return None
    if not files:
        raise MisconfigurationException(
            f"expected a checkpoint for --ckpt_path {asked}, got none in {places}; set the directory of the run "
            "with --trainer.default_root_dir, or use --ckpt_path auto to start at epoch 0"
        )
    newest = max(_found(path, runs) for path in files)
    if asked == "auto":
        rank_zero_info(f"--ckpt_path auto: continuing from {str(newest.path)!r}")
    if fitting:
        trainer.callbacks.insert(0, ContinueRun(newest.run, trainer))
    return str(newest.path)


def _found(path: Path, runs: list[Path]) -> _Found:
    """Return the position of a checkpoint in the history; files outside the runs contain the name of their run."""
    step, name = float("inf"), None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, name = float(held["global_step"]), (held.get("settings") or {}).get("run")
    except Exception:  # the exception of a damaged file depends on the damage
        pass
    inside = [number for number, run in enumerate(runs) if path.is_relative_to(run)]
    known = inside or [number for number, run in enumerate(runs) if run.name == name] or [len(runs) - 1]
    rank = known[-1] if _numbered(runs) or not runs else 0
    return _Found(rank, step, path.stat().st_mtime_ns, path, runs[known[-1]] if runs else None)


def _runs(trainer: L.Trainer) -> list[Path]:
    """Return the run directories created by the trainer's first logger, which ``ModelCheckpoint`` writes to."""
    if not trainer.loggers:
        return [Path(trainer.default_root_dir)]
    folder = _folder(trainer)
    version = getattr(trainer.loggers[0], "_version", None)
    if version is not None and version != SLURMEnvironment.job_id():  # configured by the user
        return [folder / (version if isinstance(version, str) else f"version_{version}")]
    marks = ("checkpoints", "labels.npz", "results.json")  # written by a fit, not by an evaluation
    runs = [path for path in folder.glob("*") if any((path / mark).exists() for mark in marks)]
    return sorted(runs, key=lambda run: (_number(run)[1], run.name))


def _number(run: Path) -> tuple[str, int]:
    """Return prefix and number of a run such as ``version_3``; the number is -1 if there is none."""
    found = re.fullmatch(r"(\D*)(\d+)", run.name)
    return (found[1], int(found[2])) if found else (run.name, -1)


def _numbered(runs: list[Path]) -> bool:
    """Return whether the names of all runs are a common prefix and a number, so that the newest one is known."""
    return len({_number(run)[0] for run in runs}) == 1 and all(_number(run)[1] >= 0 for run in runs)


def _folder(trainer: L.Trainer) -> Path:
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


class _Writer(ExperimentWriter):
    """Writer of ``metrics.csv`` that keeps an existing file; Lightning's deletes it before the checkpoint is loaded."""

    def _check_log_dir_exists(self) -> None:
        pass


class ContinueRun(L.Callback):
    """Continue in the directory of an earlier run; its files are unchanged until the checkpoint is accepted.

    A logger of Lightning writes to the directory of the run, and its ``metrics.csv``, which the logger would delete, is
    renamed. If the run was copied, ``ModelCheckpoint`` continues with the files of the copy. The resumed checkpoint is
    removed or overwritten by ``ModelCheckpoint`` as any other; Lightning keeps it, so that each resume would leave one
    more file.

    Args:
        run: the run directory; None if the trainer has no logger.
        trainer: the trainer, whose loggers are directed there.
    """

    def __init__(self, run: Path | None, trainer: Any) -> None:
        self._tables: list[Path] = []
        self._resumed_from: Any = None
        for logger in trainer.loggers:
            if run is not None and isinstance(logger, (CSVLogger, TensorBoardLogger)):
                logger._version = run.name
                self._tables.append(Path(logger.log_dir) / "metrics.csv")
            if run is not None and isinstance(logger, CSVLogger) and trainer.is_global_zero:
                logger._experiment = _Writer(logger.log_dir)
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")

    def on_load_checkpoint(self, trainer: Any, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the directories in the state of ``ModelCheckpoint``, if the run was copied or moved."""
        states = checkpoint.get("callbacks", {})
        for saver in trainer.checkpoint_callbacks:
            state = states.get(saver.state_key, {})
            before, now = state.get("dirpath"), getattr(saver, "dirpath", None)
            if before and now and before != now:
                states[saver.state_key] = _moved(state, str(before), str(now))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rename the metrics files: the checkpoint is loaded and accepted, and the loggers have not written yet."""
        for table in self._tables:
            _keep(table)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let checkpoint callbacks treat the loaded checkpoint as any other."""
        self._resumed_from, trainer.ckpt_path = trainer.ckpt_path, None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore ``trainer.ckpt_path``."""
        trainer.ckpt_path = self._resumed_from


def _moved(value: Any, before: str, now: str) -> Any:
    """Return a state with the paths below one directory replaced by those below another."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(part, before, now) for key, part in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value.removeprefix(before)
    return value


@rank_zero_only
def _keep(table: Path) -> None:
    """Rename the metrics file, which the logger would overwrite with rows from the checkpoint on."""
    number = 0
    while (kept := table.with_name(f"metrics_before_resume_{number}.csv")).exists():
        number += 1
    if table.exists():
        os.replace(table, kept)
