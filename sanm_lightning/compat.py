"""Everything that relies on private parts of Lightning, each with a test."""

from typing import Any

__all__ = ["batch_number", "resume_evaluation"]


def batch_number(trainer: Any) -> int:
    """Return the number of the present training batch within its epoch, from 0; -1 before the first one."""
    return int(trainer.fit_loop.batch_idx)


def resume_evaluation(loops: dict[str, Any]) -> None:
    """Let a run that is resumed from the last step of an epoch begin with the evaluation of that epoch.

    Lightning 2.6 leaves out the rest of such an epoch, and a figure is missing. The state written here is the one that it
    saves in the evaluation itself, before its first batch.

    Args:
        loops: the state of the fit loop in a checkpoint; changed where the checkpoint was written by ``on_train_batch_end`` of
            the last batch of an epoch, otherwise left as it is.
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
