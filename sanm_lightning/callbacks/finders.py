"""Apply the results of Lightning's ``BatchSizeFinder`` and ``LearningRateFinder`` to a method."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import rank_zero_info

from sanm_lightning.compat import limit_batch_size

__all__ = ["Finders"]


class Finders(L.Callback):
    """Create optimizer and schedule again, with the batch size and the learning rate that Lightning's finders have found.

    Lightning runs the finders after the optimizer and its schedule are created, so the schedule would keep the number
    of steps and the learning rate of before. A batch size above the number of training samples is reduced to it.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the finders can be used, and limit the search to the number of training samples.

        Raises:
            ValueError: if the run is resumed, or if a stage of the method overrides the learning rate.
        """
        finders = _finders(trainer)
        if stage != "fit" or not finders:
            return
        if trainer.ckpt_path:
            raise ValueError(
                f"expected a new run with {type(finders[0]).__name__}, got the checkpoint {str(trainer.ckpt_path)!r}; "
                "remove the callback, and set the batch size and the learning rate of the checkpoint's run"
            )
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

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Reduce the batch size to the number of samples, and create optimizer and schedule again."""
        finders, data = _finders(trainer), trainer.datamodule
        if not finders or trainer.fast_dev_run:
            return
        num_samples = getattr(data, "num_samples", None)
        for finder in finders:
            found = getattr(finder, "optimal_batch_size", None)
            if found is not None and num_samples is not None and found > num_samples:
                data.batch_size = finder.optimal_batch_size = num_samples
                rank_zero_info(f"batch size {num_samples}, the number of training samples, instead of {found}")
        trainer.strategy.setup_optimizers(trainer)


def _finders(trainer: Any) -> list[Any]:
    return [part for part in trainer.callbacks if isinstance(part, (BatchSizeFinder, LearningRateFinder))]
