"""Resume a run: find the checkpoint of ``--ckpt_path last`` and continue in its run directory."""

import os
import re
import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

__all__ = ["resolve_ckpt_path"]


def resolve_ckpt_path(trainer: L.Trainer, asked: str | None, fitting: bool = True) -> str | None:
    """Resolve ``last`` or ``hpc`` to a file, and continue in the run directory of that checkpoint.

    ``last`` is the newest checkpoint among the directories that this trainer writes to: those of every
    ``ModelCheckpoint``, those of all runs of its logger (``lightning_logs/version_*/checkpoints``), and the files saved
    on a SLURM signal (``hpc_ckpt_*.ckpt``). ``hpc`` is the last of the latter. Lightning searches the directory of the
    new run only, and trains from scratch if it is empty. A Lightning logger with numbered runs continues in the run of
    the checkpoint; its ``metrics.csv``, which Lightning would delete, is renamed.

    Args:
        trainer: a trainer that has not run yet.
        asked: value of ``--ckpt_path``. Values other than ``last`` and ``hpc`` are returned unchanged; None under
            SLURM means ``hpc`` if such a file exists, as in Lightning.
        fitting: whether the run is a fit; an evaluation writes to a new run directory.

    Returns:
        Path of the checkpoint, or None.

    Raises:
        MisconfigurationException: if there is no such checkpoint; the message lists the searched directories.
    """
    root = Path(trainer.default_root_dir)
    signalled = sorted(root.glob("hpc_ckpt_*.ckpt"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    if asked is None and signalled and SLURMEnvironment.detect():
        asked = "hpc"
    if asked not in ("last", "hpc"):
        return asked
    runs = _runs(trainer)
    given = [
        Path(part.dirpath)
        for part in trainer.checkpoint_callbacks
        if isinstance(part, ModelCheckpoint) and part.dirpath
    ]
    if asked == "hpc":
        searched, found = [root], signalled[-1:]
    else:
        searched = [*given, *(run / "checkpoints" for run in runs or [_folder(trainer) / "*"]), root]
        found = [path for folder in searched[:-1] for path in folder.glob("*.ckpt")] + signalled
    if not found:
        places = ", ".join(dict.fromkeys(repr(str(folder)) for folder in searched))
        raise MisconfigurationException(
            f"expected a checkpoint for --ckpt_path {asked}, got none in {places}; set the directory of the run "
            "with --trainer.default_root_dir, or omit --ckpt_path to start at epoch 0"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    own = [run for run in runs if run / "checkpoints" == newest.parent]
    if fitting and (own or runs):
        _go_on_in(trainer, own[0] if own else max(runs, key=_age))
    return str(newest)


def _runs(trainer: L.Trainer) -> list[Path]:
    """Return the run directories created by the trainer's first logger, which ``ModelCheckpoint`` writes to."""
    if not trainer.loggers:
        return [Path(trainer.default_root_dir)]
    folder = _folder(trainer)
    version = getattr(trainer.loggers[0], "_version", None)
    if version is not None and version != SLURMEnvironment.job_id():  # configured by the user
        return [folder / (version if isinstance(version, str) else f"version_{version}")]
    marks = ("checkpoints", "labels.npz", "results.json")  # written by a fit, not by an evaluation
    return sorted(path for path in folder.glob("*") if any((path / mark).exists() for mark in marks))


def _folder(trainer: L.Trainer) -> Path:
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def _age(run: Path) -> int:
    return max((path.stat().st_mtime_ns for path in run.glob("*")), default=0)


def _go_on_in(trainer: L.Trainer, run: Path) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            logger._version = run.name
            _keep(Path(logger.log_dir) / "metrics.csv")
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")


@rank_zero_only
def _keep(table: Path) -> None:
    """Rename the metrics file, which the logger would overwrite with rows from the checkpoint on."""
    number = 0
    while (kept := table.with_name(f"metrics_before_resume_{number}.csv")).exists():
        number += 1
    if table.exists():
        os.replace(table, kept)
