"""GCE (Zhang and Sabuncu, NeurIPS 2018): generalized cross-entropy, also truncated."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import generalized_cross_entropy, truncated_generalized_cross_entropy
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import require_index
from sanm_lightning.per_sample import LabelStore

__all__ = ["GCE"]


class GCE(NoisyLabelModule):
    """Generalized cross-entropy, between cross-entropy and mean absolute error, which is more robust to wrong labels.

    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 6; with ``truncation``, Eq. 11 and Algorithm 1: after the first stage, samples
    whose probability of the given label is at most k do not contribute to the loss, and are chosen again every
    ``prune_every`` epochs.

    Departures: samples are chosen by the current network in evaluation mode, on images without augmentation, where the paper
    uses the network of the best validation accuracy. The loss is averaged over the batch, where the paper sums it.

    Under SANM, the loss is the expectation over the regularized target of the masked view.

    Args:
        num_classes: C, number of classes.
        q: in (0, 1]; the limit 0 is cross-entropy, 1 is mean absolute error. Published: 0.7.
        truncation: k, in (0, 1); published: 0.5. None disables the truncation.
        prune_every: epochs after which samples are chosen again.
        warmup_epochs: with ``truncation``, the length of the first stage, in which all samples are used; published: 40 on
            CIFAR-10, 80 on CIFAR-100. Otherwise, it affects SANM only.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range; with ``truncation``, if batches have no index.
    """

    def __init__(
        self,
        num_classes: int,
        q: float = 0.7,
        truncation: float | None = None,
        prune_every: int = 10,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        if not 0 < q <= 1:
            raise ValueError(f"expected q in (0, 1], got {q}; use CrossEntropy for q = 0")
        if truncation is not None and not 0 < truncation < 1:
            raise ValueError(f"expected truncation in (0, 1) or null, got {truncation}; use null for all samples")
        if prune_every < 1:
            raise ValueError(f"expected prune_every of 1 epoch or more, got {prune_every}; use 10")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.q, self.truncation, self.prune_every = q, truncation, prune_every
        if truncation is not None:
            self.needs_data_module = True
            self.selection = LabelStore(dist_reduce_fx=None)

    def stages(self) -> list[Stage]:
        """Return one stage, or that of all samples and that of the chosen samples."""
        return (
            super().stages() if self.truncation is None else [Stage("warmup", self.warmup_epochs), Stage("truncated")]
        )

    def begin_epoch(self) -> None:
        """Choose the samples whose probability of the given label is above k."""
        epoch = self.current_epoch - self.warmup_epochs
        if self.truncation is not None and epoch >= 0 and epoch % self.prune_every == 0:
            probability = torch.exp(-self.predict_train("loss")["loss"])
            self.selection.update(selected=probability > self.truncation)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        out = self.learn(batch, self.one_hot(batch.labels))
        if self.truncation is None or self.stage.name == "warmup":
            return generalized_cross_entropy(out.logits, out.targets, self.q).mean() + out.reconstruction
        kept = out.per_view(self.selection.selected[require_index(batch, type(self).__name__)])
        loss = truncated_generalized_cross_entropy(out.logits, out.targets, self.q, self.truncation, kept)
        return loss.mean() + out.reconstruction
