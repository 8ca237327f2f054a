"""Functions that depend on private attributes of Lightning, each with a test."""

import math
from collections.abc import Collection
from typing import Any

import torch

__all__ = [
    "batch_number",
    "epochs_of_steps",
    "fill_average",
    "limit_batch_size",
    "restart_average",
    "restore_loader",
    "resume_evaluation",
    "set_up_again",
    "sets_rate",
    "validates_next",
]

COPYING = {"WeightAveraging", "StochasticWeightAveraging"}
"""Callbacks that copy the module in ``setup``, by name, because lightning and pytorch_lightning have separate classes."""


def batch_number(trainer: Any) -> int:
    """Return the number of the current training batch within its epoch, from 0; -1 before the first batch."""
    return int(trainer.fit_loop.batch_idx)


def epochs_of_steps(trainer: Any) -> float:
    """Return the number of epochs of a new run that begin within ``max_steps``, to be called in ``on_train_start``.

    It is infinite without this limit, with ``fast_dev_run``, in a resumed run, and where the number of optimizer steps of an
    epoch is unknown: without a length of the training set, or with a schedule of accumulation.
    """
    # by name, because lightning and pytorch_lightning have separate classes
    kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}
    unknown = math.isinf(trainer.num_training_batches) or "GradientAccumulationScheduler" in kinds
    if trainer.max_steps < 0 or unknown or trainer.global_step > 0 or getattr(trainer, "fast_dev_run", False):
        return math.inf
    steps = math.ceil(max(1, trainer.num_training_batches) / trainer.accumulate_grad_batches)
    return float(math.ceil(trainer.max_steps / steps))


def validates_next(trainer: Any) -> bool:
    """Return whether a validation follows the current training step, in ``on_train_batch_end``; it may stop the run."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def resume_evaluation(loops: dict[str, Any]) -> None:
    """Make a run that is resumed from the last step of an epoch start with the evaluation of that epoch.

    Lightning 2.6 skips the rest of such an epoch, so its evaluation is missing. The modified state equals the one that
    Lightning saves during the evaluation, before its first batch.

    Args:
        loops: state of the fit loop in a checkpoint, modified in place if the checkpoint was written in
            ``on_train_batch_end`` of the last batch of an epoch.
    """
    train, evaluation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    total = train["total"]
    at_its_end = total["completed"] + 1 == total["processed"] == total["started"] == total["ready"]
    if not (train["is_last_batch"] and at_its_end):
        return
    for counts in (total, train["current"]):
        counts["completed"] += 1
    evaluation["total"].update(ready=1, started=1, processed=0, completed=0)
    evaluation["current"].update(ready=0, started=0, processed=0, completed=0)
    evaluation["is_last_batch"] = False


def restore_loader(trainer: Any) -> None:
    """Restore the position of the training loader, unless it is restored.

    Lightning restores it when it creates the loader. A schedule over the whole training needs the loader earlier, before
    the checkpoint's loops are restored.
    """
    trainer.fit_loop._load_combined_loader_states()


def set_up_again(trainer: Any, pl_module: Any, own: Collection[Any]) -> None:
    """Repeat the setup of Lightning's callbacks that copy the module or list its parameters, after SANM is added to it.

    A copy made before lacks the decoder, and weights would be averaged with those of other layers. A list made after
    would prune the decoder.

    Args:
        trainer: trainer with the callbacks.
        pl_module: module with SANM.
        own: submodules that belong to SANM, which are not pruned.
    """
    for callback in trainer.callbacks:
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if "ModelPruning" in kinds:
            listed = callback.sanitize_parameters_to_prune(
                pl_module, callback._parameters_to_prune, parameter_names=callback._parameter_names
            )
            callback._parameters_to_prune = [(module, name) for module, name in listed if module not in own]
        elif not kinds & COPYING:
            continue
        callback.setup(trainer, pl_module, "fit")


def restart_average(callback: Any) -> None:
    """Make the next update of a callback that averages weights copy them, as its first update does."""
    count = _average(callback)[1]
    if count is not None:  # not before the first update of StochasticWeightAveraging
        count.zero_()


@torch.no_grad()
def fill_average(callback: Any, pl_module: Any) -> None:
    """Copy the weights to the average of a callback that has no update yet, or none since it was restarted."""
    average, count = _average(callback)
    if average is None or count is None or int(count) > 0:
        return
    for kind in ("parameters", "buffers"):
        for value, current in zip(getattr(average, kind)(), getattr(pl_module, kind)(), strict=True):
            value.copy_(current)


def _average(callback: Any) -> tuple[Any, Any]:
    """Return the averaged module of a callback and the number of its updates; None for other callbacks."""
    kinds = {kind.__name__ for kind in type(callback).__mro__}
    if "WeightAveraging" in kinds:
        return getattr(callback._average_model, "module", None), getattr(callback._average_model, "n_averaged", None)
    return (callback._average_model, callback.n_averaged) if kinds & COPYING else (None, None)


def limit_batch_size(finder: Any, num_samples: int) -> None:
    """Stop the search of a ``BatchSizeFinder`` at the number of samples; Lightning reads it from torch's loaders only."""
    finder._max_val = min(finder._max_val, num_samples)


def sets_rate(finder: Any) -> bool:
    """Return whether a ``LearningRateFinder`` sets the learning rate that it finds."""
    return bool(finder._update_attr)
