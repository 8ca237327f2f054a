"""What every method for learning with noisy labels shares: a network, targets, label quality, metrics, an optimizer."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.schedules import takes_total_steps
from sanm_lightning.models import create_network
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.module import SANM, Quality

__all__ = ["NoisyLabelModule", "sgd"]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the field's usual optimizer: SGD, learning rate .02, momentum .9, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


class NoisyLabelModule(SANMMixin, L.LightningModule):
    """Base class of the methods. A method is one file with one class and one ``training_step``.

    Batches are :class:`NoisyBatch`, or any ``(images, labels)`` pair.

    Args:
        num_classes: C; flows from the data module on the command line.
        image_size: H, W of the images in pixels; likewise.
        network: timm model name, or a network by timm's conventions that takes images in [0, 1].
        network_args: options of that timm model, as ``{width: 16}`` or ``{pretrained: true}``.
        mean: channel means that the network normalises with; None takes the pre-trained ones, or .5.
        std: channel standard deviations, likewise, or .25.
        sanm: SANM laid over the method; None is the plain published method.
        warmup_epochs: epochs before the method, and SANM over it, does more than plain training.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule; one that takes ``total_steps`` gets them from the trainer and is stepped
            per batch, any other is stepped per epoch. None keeps the rate constant.

    A checkpoint holds all of these but a network given as a module, the optimizer and the scheduler (those of the command line
    it does hold): ``load_from_checkpoint`` needs them only to go on training.

    Raises:
        ValueError: if an argument is out of its range, or the network cannot serve SANM.
    """

    wraps_training_step = False

    def __init__(
        self,
        num_classes: int,
        image_size: tuple[int, int] | None = (32, 32),
        network: str | nn.Module = "preact_resnet18",
        network_args: dict[str, Any] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        sanm: SANM | None = None,
        warmup_epochs: int = 10,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"expected num_classes >= 2, got {num_classes}; a data module gives it as a property")
        if image_size is None:
            raise ValueError("expected image_size (H, W) in pixels, got None; a data module gives it as a property")
        if warmup_epochs < 0:
            raise ValueError(f"expected warmup_epochs >= 0, got {warmup_epochs}")
        super().__init__(sanm=SANM.off() if sanm is None else sanm)
        live = ["optimizer", "scheduler", *([] if isinstance(network, str) else ["network"])]
        self.save_hyperparameters(ignore=live)  # what is left is plain Python, so that a checkpoint opens safely
        self.num_classes = num_classes
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.warmup_epochs = warmup_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        if isinstance(network, str):
            options = network_args or {}
            self.network: Any = create_network(network, num_classes, mean, std, **options)
            if options.get(
                "pretrained"
            ):  # a checkpoint holds the weights: loading it must not fetch the first ones again
                mean, std = (tuple(part.flatten().tolist()) for part in (self.network.mean, self.network.std))
                self.hparams.update(network_args={**options, "pretrained": False}, mean=mean, std=std)
        else:
            self.network = network
        self.sanm.build(self.network, self.image_size)
        self.accuracy = nn.ModuleDict()  # one per evaluation set, made when it is first seen

    # What a method calls

    def one_hot(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> targets (B, C), float32."""
        return F.one_hot(labels, self.num_classes).float()

    def quality(self, batch: NoisyBatch, targets: Tensor) -> Quality:
        """Return the label quality of a batch, as SANM takes it; None in the warm-up and without SANM."""
        if not self.sanm.masking(self.current_epoch, self.warmup_epochs):
            return None
        return self.sanm.source_of_quality(targets, batch.index, batch.true_labels)

    def observe(self, batch: NoisyBatch, logits: Tensor, targets: Tensor) -> None:
        """Remember what the network says of the unmasked images: logits (B, C), targets (B, C)."""
        if self.sanm.enabled:
            self.sanm.label_quality.observe(logits, targets, batch.index)

    # What Lightning calls

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C), as the method predicts."""
        logits: Tensor = self.network(images)
        return logits

    def on_train_start(self) -> None:
        """Refuse labels that the network has no class for, before the first step."""
        labels = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
        if isinstance(labels, Tensor) and len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(f"expected labels in [0, {self.num_classes}), got {int(labels.max())}")

    def on_train_batch_end(self, outputs: Any, batch: NoisyBatch, batch_idx: int) -> None:
        """Log the loss of the step; Lightning hands it over divided by the number of batches that are accumulated."""
        loss = outputs["loss"] * self.trainer.accumulate_grad_batches
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]), prog_bar=True, sync_dist=True
        )

    def _evaluation_name(self, dataloader_idx: int) -> str:
        names = getattr(getattr(self.trainer, "datamodule", None), "eval_names", None) or ["val"]
        return str(names[dataloader_idx]) if dataloader_idx < len(names) else f"val{dataloader_idx}"

    def _evaluate(self, batch: NoisyBatch, name: str) -> None:
        images, labels = batch[0], batch[1]
        if name not in self.accuracy:
            self.accuracy[name] = MulticlassAccuracy(self.num_classes, average="micro").to(self.device)
        metric = self.accuracy[name]
        metric.update(self(images), labels)  # type: ignore[operator]
        options = {
            "on_epoch": True,
            "add_dataloader_idx": False,
            "prog_bar": True,
            "metric_attribute": f"accuracy.{name}",
        }
        self.log(f"{name}/acc", metric, **options)  # type: ignore[arg-type]

    def validation_step(self, batch: NoisyBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right predictions of each evaluation set of the data module."""
        self._evaluate(batch, self._evaluation_name(dataloader_idx))

    def test_step(self, batch: NoisyBatch, batch_idx: int) -> None:
        """Count right predictions of the test set."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: NoisyBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return index (B,) where the batch has one, and probabilities (B, C)."""
        index = getattr(batch, "index", None)
        out = {} if index is None else {"index": index}
        return {**out, "probabilities": self(batch[0]).float().softmax(1)}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer over everything that learns, and its schedule."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.scheduler is None:
            return optimizer
        if takes_total_steps(self.scheduler):
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = self.scheduler(optimizer, total_steps=steps)  # type: ignore[call-arg]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}  # type: ignore[typeddict-item]
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}  # type: ignore[typeddict-item]
