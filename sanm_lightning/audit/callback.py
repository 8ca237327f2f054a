"""Write the files of an audit after training."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.audit.run_folder import write_audit
from sanm_lightning.audit.sets import audit_set_of
from sanm_lightning.audit.summary import summarize
from sanm_lightning.functional import clean_probability, nearest_neighbors
from sanm_lightning.safe_files import atomic_write
from sanm_lightning.sanm.estimate import estimated_quality

__all__ = ["LabelAudit", "detection_metrics"]

_KEY = "label_audit"


def detection_metrics(quality: Tensor, labels: Tensor, true_labels: Tensor | None) -> dict[str, float] | None:
    """Measure the detection of wrong labels by low quality.

    Args:
        quality: shape (N,), in [0, 1].
        labels: given labels, shape (N,).
        true_labels: true labels, shape (N,); used for these metrics only.

    Returns:
        ``precision_at_100``, ``_500`` and ``_1000`` (fraction of wrong labels among the n samples of lowest quality,
        for n smaller than N), ``auroc`` and ``average_precision``; None if the true labels are unknown, or no (or all)
        labels are wrong.
    """
    if true_labels is None:
        return None
    wrong = (labels != true_labels).cpu()
    if not bool(wrong.any()) or bool(wrong.all()):
        return None
    score = 1 - quality.detach().float().cpu()
    order = score.argsort(descending=True, stable=True)
    found = {f"precision_at_{n}": float(wrong[order[:n]].float().mean()) for n in (100, 500, 1000) if n < len(order)}
    found["auroc"] = float(binary_auroc(score, wrong.long()))
    found["average_precision"] = float(binary_average_precision(score, wrong.long()))
    return found


class LabelAudit(L.Callback):
    """Write the files of an audit to the run directory at the end of a fit.

    The quality is that used in training, estimated by SANM or the method, as the mean over networks and the last
    epochs. Without SANM and without an estimate of the method, it is the posterior of a mixture on the losses of a
    final pass. The class probabilities are the mean over the networks in the final pass; features are those of the
    first network. Probabilities are in-sample, which ``audit.json`` states: a network that has memorized wrong labels
    agrees with them. Use ``sanm audit`` for out-of-fold probabilities.

    Supports methods of this package that train a classifier, with a data module of this package; has no effect for
    others, and in a ``fast_dev_run``.

    Args:
        epochs: number of last epochs over which the quality is averaged.
        neighbors_up_to: maximum size of the training set for the nearest-neighbor search.

    Raises:
        ValueError: if ``epochs`` is smaller than 1.
    """

    def __init__(self, epochs: int = 5, neighbors_up_to: int = 20_000) -> None:
        if epochs < 1:
            raise ValueError(f"expected epochs of 1 or more, got {epochs}; use 1 for the last epoch only")
        self.epochs, self.neighbors_up_to = epochs, neighbors_up_to
        self.metrics: dict[str, float] | None = None
        """Result of :func:`detection_metrics` after the fit."""
        self._qualities: list[Tensor] = []  # of the last epochs, each (N,)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the quality of this epoch."""
        if _serves(trainer, pl_module):
            quality = _quality_in_training(pl_module)
            self._qualities = [*self._qualities, *([] if quality is None else [quality])][-self.epochs :]

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Run a final pass over the training set and write the files. Collective operation.

        It is not in ``on_train_end``, which is not called in a run that was killed after its last step and is resumed.
        """
        if not _serves(trainer, pl_module) or trainer.current_epoch == 0:
            return
        found = pl_module.predict_train("logits", "features", "loss", network=None)
        data = trainer.datamodule
        probs = found["logits"].softmax(2).mean(0).cpu()
        own = bool(self._qualities)
        losses = found["loss"].mean(0)
        quality = torch.stack(self._qualities).mean(0) if own else clean_probability(losses).cpu()
        self.metrics = detection_metrics(quality, data.labels, data.true_labels)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast, which every rank must call
        if trainer.is_global_zero:
            source = "of the training" if own else "mixture on the losses of the last pass, in-sample"
            self._write(folder, data, probs.numpy(), quality, found["features"][0].cpu(), source)

    def _write(self, folder: Path, data: Any, probs: Any, quality: Tensor, features: Tensor, source: str) -> None:
        pool = audit_set_of(data)
        given, place = pool.labels, np.arange(len(pool.labels))
        suggested = probs.argmax(1)
        near = None
        if 1 < len(given) <= self.neighbors_up_to:
            near = given[nearest_neighbors(features, min(10, len(given) - 1)).numpy()]
        issues = LabelIssues(
            paths=pool.paths,
            splits=pool.splits,
            given=given,
            suggested=suggested,
            quality=quality.numpy().clip(0, 1),
            p_given=probs[place, given].clip(0, 1),
            p_suggested=probs[place, suggested].clip(0, 1),
            class_names=pool.class_names,
            neighbor_labels=near,
            index=pool.index,
        )
        joint = np.zeros((len(pool.class_names),) * 2)
        np.add.at(joint, (given, given), issues.quality)
        other = probs.copy()
        other[place, given] = 0
        other /= np.maximum(other.sum(1, keepdims=True), 1e-12)
        np.add.at(joint, given, (1 - issues.quality)[:, None] * other)
        joint /= joint.sum()
        summary = summarize(pool, issues, joint)
        summary["quality"] = source
        summary["probabilities"] = "in-sample"
        summary["notes"].append(
            f"Quality: {source}. Probabilities are in-sample: the networks were trained on these labels."
        )
        write_audit(folder, pool, issues, probs, summary)
        with atomic_write(folder / "features.npy") as file:
            np.save(file, features.float().numpy())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the qualities of the last epochs; Lightning warns about a missing callback if ``state_dict`` is used."""
        checkpoint[_KEY] = list(self._qualities)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the qualities of the last epochs."""
        self._qualities = list(checkpoint.get(_KEY, []))


def _serves(trainer: Any, pl_module: Any) -> bool:
    data = getattr(trainer, "datamodule", None)
    ours = all(hasattr(data, name) for name in ("table", "store", "pass_dataloader", "class_names"))
    method = all(hasattr(pl_module, name) for name in ("predict_train", "num_classes"))
    return ours and method and getattr(pl_module, "trains_classifier", True) and not trainer.fast_dev_run


def _quality_in_training(module: Any) -> Tensor | None:
    """Return the estimated quality, (N,), on the CPU; None if there is none. The oracle is not an estimate."""
    sanms = [sanm for sanm in getattr(module, "sanms", []) if sanm.enabled and sanm.quality != "oracle"]
    return estimated_quality(module, sanms)
