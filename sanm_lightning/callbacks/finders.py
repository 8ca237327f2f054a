"""Apply the results of Lightning's ``BatchSizeFinder`` and ``LearningRateFinder`` to a method."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info

from sanm_lightning.compat import limit_batch_size, sets_rate

__all__ = ["Finders"]

SKIPPED = 10, 1
"""Losses at the beginning and at the end that ``LearningRateFinder`` ignores."""


DIVERGED = 4.0
"""Ratio to the lowest loss above which a loss has diverged: Lightning's default ``early_stop_threshold``."""


class Finders(L.Callback):
    """Create optimizer and schedule again, with the batch size and the learning rate that Lightning's finders have found.

    Lightning runs the finders after the optimizer and its schedule are created, so the schedule would keep the number
    of steps and the learning rate of before. A batch size above the number of training samples is reduced to it.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the finders can be used, and limit the search to the number of training samples.

        Raises:
            ValueError: if a stage of the method overrides the learning rate.
        """
        finders = _finders(trainer) if stage == "fit" else []
        pl_module.finders_pending = bool(finders)
        if not finders:
            return
        stages = [stage.name for stage in pl_module.stages() if stage.lr is not None]
        if stages and any(isinstance(finder, LearningRateFinder) for finder in finders):
            raise ValueError(
                "expected stages with the learning rate of the optimizer for LearningRateFinder, got another one in "
                f"the stage {stages[0]!r} of {type(pl_module).__name__}; remove the callback"
            )
        num_samples = getattr(trainer.datamodule, "num_samples", None)
        for finder in finders:
            if isinstance(finder, BatchSizeFinder) and num_samples is not None:
                limit_batch_size(finder, num_samples)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoints from which a finder restores the module after its trials."""
        if pl_module.finders_pending:
            checkpoint["finder"] = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run with a finder, whose result optimizer and schedule of the checkpoint would replace.

        Raises:
            ValueError: if the run is resumed.
        """
        if pl_module.finders_pending and "finder" not in checkpoint:
            raise ValueError(
                f"expected a new run with {type(_finders(trainer)[0]).__name__}, got a checkpoint to resume from; remove the "
                "callback, and set the batch size of the first run"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Reduce the batch size to the number of samples, and create optimizer and schedule again.

        Raises:
            ValueError: if ``LearningRateFinder`` has too few losses for a suggestion, or suggests a rate at which the loss
                has diverged.
        """
        if not pl_module.finders_pending:
            return
        for finder in _finders(trainer):
            if isinstance(finder, BatchSizeFinder):
                _limit_found(finder, trainer.datamodule)
            elif finder.optimal_lr is not None and sets_rate(finder):
                _require_losses(finder.optimal_lr.results["loss"])
                _require_convergence(finder.optimal_lr)
        pl_module.finders_pending = False
        pl_module.resumed_schedule = None  # of the checkpoint of a finder
        trainer.strategy.setup_optimizers(trainer)


def _limit_found(finder: BatchSizeFinder, data: Any) -> None:
    num_samples, found = getattr(data, "num_samples", None), finder.optimal_batch_size
    if num_samples is not None and found is not None and found > num_samples:
        data.batch_size = finder.optimal_batch_size = num_samples
        rank_zero_info(f"batch size {num_samples}, the number of training samples, instead of {found}")


def _require_losses(losses: list[float]) -> None:
    finite = sum(map(math.isfinite, losses[SKIPPED[0] : -SKIPPED[1]]))
    if finite < 2:
        raise ValueError(
            f"expected at least {sum(SKIPPED) + 2} steps of LearningRateFinder with finite losses, got {len(losses)} steps; "
            "raise max_epochs or early_stop_threshold, or lower max_lr"
        )


def _require_convergence(found: Any) -> None:
    """Raise if the loss diverged before the suggestion, which happens only without ``early_stop_threshold``."""
    suggested = found.suggestion(*SKIPPED)
    losses = found.results["loss"][: found.results["lr"].index(suggested) + 1]
    if any(not loss <= DIVERGED * min(losses[: step + 1]) for step, loss in enumerate(losses)):
        raise ValueError(
            f"expected a suggestion of LearningRateFinder below the rate at which the loss diverges, got {suggested:.3g}; "
            "set early_stop_threshold, or lower max_lr"
        )


def _finders(trainer: Any) -> list[Any]:
    return [part for part in trainer.callbacks if isinstance(part, (BatchSizeFinder, LearningRateFinder))]
