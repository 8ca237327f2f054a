"""The hooks that a method overrides; the defaults are those of plain training."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import EpochPlan, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.callbacks.stages import locate
from sanm_lightning.sanm.module import SANM

__all__ = ["MethodHooks"]


class MethodHooks(L.LightningModule):
    """Stages, views, samples and label quality of a method."""

    num_classes: int
    num_networks = 1
    """1 or 2. Two networks mask with each other's estimate of label quality."""
    needs_data_module = False
    """True in a method that chooses its samples or views, or passes over the training set."""
    reads_labels = True
    """False in a method that learns from images alone, and can say nothing of labels."""
    estimates_quality = False
    """True in a method that judges labels itself, by :meth:`label_quality`."""

    @property
    def networks(self) -> list[Any]:
        """All networks in training."""
        return [getattr(self, name) for name in ("network", "network2")[: self.num_networks]]

    @property
    def sanms(self) -> list[SANM]:
        """The SANM of each network."""
        return [getattr(self, name) for name in ("sanm", "sanm2")[: self.num_networks]]

    def stages(self) -> list[Stage]:
        """Return the stages of the training, in order."""
        return [Stage("train")]

    def views(self) -> tuple[View, ...]:
        """Return the policies of the views of the present stage; ``batch.views`` holds the views in this order."""
        return ("weak",)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Choose the samples of every step of this process in the present epoch.

        Returns:
            Positions in the training set, shape (S, B), with S = ``plan.steps``; duplicates are allowed. None takes the
            loader's own batches. A function of the epoch, the seed and what is saved: a run that is resumed in mid-epoch
            asks again.
        """
        return None

    def begin_epoch(self) -> None:
        """Do what the method does once per epoch, before its first batch is fetched; not again in a resumed epoch."""

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Raise ValueError for a training set that the method cannot learn from."""

    def label_quality(self) -> Tensor | None:
        """Return the method's own estimate for each given label, (N,) in [0, 1], 1 = right; None where it has none."""
        return None

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C); of two networks the mean."""
        logits: list[Tensor] = [network(images) for network in self.networks]
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    @property
    def stage(self) -> Stage:
        """The stage of the present epoch."""
        return locate(self.stages(), self.current_epoch)[1]

    def one_hot(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> targets (B, C), float32."""
        return F.one_hot(labels, self.num_classes).float()
