"""Functions that depend on private attributes of Lightning, each with a test."""

from typing import Any

__all__ = ["batch_number", "resume_evaluation"]


def batch_number(trainer: Any) -> int:
    """Return the number of the current training batch within its epoch, from 0; -1 before the first batch."""
    return int(trainer.fit_loop.batch_idx)


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
