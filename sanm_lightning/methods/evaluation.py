"""Validation, test and prediction steps of all methods, for any number of loaders and all common batch forms."""

from typing import Any

import lightning as L
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.class_names import named_classes

__all__ = ["EvaluationSteps"]


class EvaluationSteps(L.LightningModule):
    """Mixin that logs the accuracy of each evaluation set, and predicts."""

    num_classes: int
    accuracy: nn.ModuleDict
    """One metric per logged name, created on first use."""
    class_names: list[str] | None = None
    """Class names of a loaded checkpoint, in the order of the class indices; None if unknown."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the class names of the data under ``class_names``, unless they are only numbers."""
        data = getattr(self._trainer, "datamodule", None)
        names = self.class_names if data is None else named_classes(data)
        if names is not None:
            checkpoint["class_names"] = names

    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, C) of images (B, C, H, W), by the suffix of the logged name."""
        return {"acc": self(images)}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the accuracy of a validation set."""
        self._evaluate(batch, self._name("val", dataloader_idx))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the accuracy of a test set."""
        self._evaluate(batch, self._name("test", dataloader_idx))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return class probabilities (B, C), and index (B,) if the batch has one.

        Raises:
            ValueError: if the batch has no images (B, C, H, W).
        """
        read = NoisyBatch.from_any(batch, need_labels=False)
        if read.images.ndim != 4:
            raise ValueError(
                f"expected images (B, C, H, W) in the batches to predict, got a tensor of shape {tuple(read.images.shape)}; "
                "pass the data module to the trainer, because its loaders return indices, or use loaders of images"
            )
        out = {} if read.index is None else {"index": read.index}
        return {**out, "probabilities": self(read.images).float().softmax(1)}

    def _name(self, default: str, dataloader_idx: int) -> str:
        """Return the split of the current batch; for other loaders, a name with the number of the loader."""
        split: str | None = getattr(getattr(self.trainer, "datamodule", None), "served_split", None)
        return split or (f"{default}{dataloader_idx}" if dataloader_idx else default)

    def _evaluate(self, batch: Any, name: str) -> None:
        read = NoisyBatch.from_any(batch)
        labels = read.labels.argmax(1) if read.labels.is_floating_point() else read.labels
        top_k = getattr(getattr(self.trainer, "datamodule", None), "top_k", None)
        for ending, logits in self.predictions(read.images).items():
            self._log_accuracy(f"{name}/{ending}", logits, labels, 1)
            if top_k is not None and top_k < self.num_classes:
                self._log_accuracy(f"{name}/{ending}_top{top_k}", logits, labels, top_k)

    def _log_accuracy(self, name: str, logits: Tensor, labels: Tensor, top_k: int) -> None:
        key = name.replace("/", "_").replace(".", "_")
        if key not in self.accuracy:
            self.accuracy[key] = MulticlassAccuracy(self.num_classes, average="micro", top_k=top_k).to(self.device)
        metric: Any = self.accuracy[key]
        metric.update(logits, labels)
        self.log(
            name, metric, on_epoch=True, add_dataloader_idx=False, prog_bar=True, metric_attribute=f"accuracy.{key}",
            batch_size=len(labels),
        )  # fmt: skip
