"""What a fit prints at its end: accuracies, files, and the next command."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.run.checkpoint import RunCheckpoint

__all__ = ["selected_on", "summary_lines"]


def summary_lines(trainer: Any, pl_module: Any, folder: Path, results: dict[str, Any]) -> list[str]:
    """Return one line for each of: accuracies, weights, results, labels, label issues, next command.

    Args:
        trainer: trainer after a fit.
        pl_module: the trained module.
        folder: run directory.
        results: content of ``results.json``.
    """
    lines = []
    further = [key.removesuffix("_accuracy_best") for key in results if key.endswith("_accuracy_best")]
    names = {"test": "test set", "val": "split val"} | {
        name: f"test set {name}" for name in further if name not in ("test", "val")
    }
    for name, split in names.items():
        best, last = (results[f"{name}_accuracy_{which}"] for which in ("best", "last"))
        if best is not None:
            lines.append(
                f"accuracy, {split}: {best:.4f} best epoch, {'unknown' if last is None else f'{last:.4f}'} last epoch"
            )
    last_path, best_path = _weights(trainer)
    if last_path or best_path:
        chosen = {"val": "", "test": " (selected on the test set)"}.get(selected_on(trainer) or "val", "")
        best = f", best epoch{chosen}: {best_path}" if best_path and best_path != last_path else ""
        lines.append(f"weights: {last_path or best_path}{best}")
    files = {"results": ["results.json"], "labels": ["labels.npz"], "label issues": ["label_issues.csv", "report.html"]}
    for what, outputs in files.items():
        written = [str(folder / name) for name in outputs if (folder / name).is_file()]
        if written:
            lines.append(f"{what}: {', to review: '.join(written)}")
    return [*lines, *_next(pl_module, last_path or best_path)]


def selected_on(trainer: Any) -> str | None:
    """Return what selected the best checkpoint of a fit.

    Args:
        trainer: trainer with checkpoint callbacks.

    Returns:
        ``val`` or ``test``, the split of the monitored accuracy; the name of another monitored metric; None if no
        checkpoint was selected.
    """
    for saver in trainer.checkpoint_callbacks:
        metric = getattr(saver, "best_metric", None) or getattr(saver, "monitor", None)
        if metric:
            return str(metric).removesuffix("/acc")
    return None


def _weights(trainer: Any) -> tuple[str, str]:
    """Return the paths of the checkpoints of the last and of the best epoch, empty if there is none."""
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, RunCheckpoint):
            return saver.best_model_path, saver.best_path
        if isinstance(saver, ModelCheckpoint):
            return saver.last_model_path, saver.best_model_path
    return "", ""


def _next(pl_module: Any, path: str) -> list[str]:
    if not path:
        return []
    if not isinstance(pl_module, NoisyLabelModule):
        return [f"next: the same command with test or predict instead of fit, and --ckpt_path {path}"]
    if not pl_module.trains_classifier:
        return [f"next: sanm fit --config configs/method/c2d.yaml --model.pretrained {path} ..."]
    return [f"next: sanm predict --ckpt_path {path} --images FOLDER"]
