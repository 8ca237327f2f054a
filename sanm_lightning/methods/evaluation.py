"""Validation, test and prediction steps of every method: any number of loaders, batches of any usual form."""

from typing import Any

import lightning as L
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.class_names import named_classes

__all__ = ["EvaluationSteps"]


class EvaluationSteps(L.LightningModule):
    """Log the accuracy of each evaluation set, and predict."""

    num_classes: int
    accuracy: nn.ModuleDict
    """One metric per figure, made when it is first logged."""
    class_names: list[str] | None = None
    """Names of the classes that a loaded checkpoint was trained on, in the order of their indices; None where unknown."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the class names of the data, under ``class_names``, where they are more than numbers."""
        data = getattr(self._trainer, "datamodule", None)
        names = self.class_names if data is None else named_classes(data)
        if names is not None:
            checkpoint["class_names"] = names

    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> logits (B, C) by the ending of the figure that they are logged as."""
        return {"acc": self(images)}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right predictions of a validation set."""
        self._evaluate(batch, self._name("eval_names", "val", dataloader_idx))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right predictions of a test set."""
        self._evaluate(batch, self._name("test_names", "test", dataloader_idx))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return class probabilities (B, C), and index (B,) where the batch has one.

        Raises:
            ValueError: if the batch has no images (B, 3, H, W).
        """
        read = NoisyBatch.from_any(batch, need_labels=False)
        if read.images.ndim != 4:
            raise ValueError(
                f"expected images (B, 3, H, W) in the batches to predict, got a tensor of shape {tuple(read.images.shape)}; "
                "give the data module to the trainer, whose loaders serve positions, or return images from your own"
            )
        out = {} if read.index is None else {"index": read.index}
        return {**out, "probabilities": self(read.images).float().softmax(1)}

    def _name(self, attribute: str, default: str, dataloader_idx: int) -> str:
        names = getattr(getattr(self.trainer, "datamodule", None), attribute, None) or [default]
        return str(names[dataloader_idx]) if dataloader_idx < len(names) else f"{default}{dataloader_idx}"

    def _evaluate(self, batch: Any, name: str) -> None:
        read = NoisyBatch.from_any(batch)
        for ending, logits in self.predictions(read.images).items():
            key = f"{name}_{ending}".replace(".", "_").removesuffix("_acc")
            if key not in self.accuracy:
                self.accuracy[key] = MulticlassAccuracy(self.num_classes, average="micro").to(self.device)
            metric: Any = self.accuracy[key]
            metric.update(logits, read.labels)
            self.log(
                f"{name}/{ending}", metric, on_epoch=True, add_dataloader_idx=False, prog_bar=True,
                metric_attribute=f"accuracy.{key}", batch_size=len(read.images),
            )  # fmt: skip
