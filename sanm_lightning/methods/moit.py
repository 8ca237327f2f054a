"""MOIT and MOIT+ (Ortego et al., CVPR 2021): interpolated contrast and classification, noisy labels found by neighbors."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import View
from sanm_lightning.functional import MixedViews, interpolated_contrast, view_positives
from sanm_lightning.methods.feature_queue import Payload
from sanm_lightning.methods.selected_contrast import SelectedContrast
from sanm_lightning.sanm.inference import infer

__all__ = ["MOIT"]


class MOIT(SelectedContrast):
    """Contrast and classify mixed views; replace the labels that the neighbors reject by predictions; fine-tune on the others.

    Source: Ortego et al., CVPR 2021, and the authors' code. Two views of a batch are mixed, each with its own weight, and have
    a supervised contrastive loss and a cross-entropy that are mixed likewise. In the first stage, all given labels are used.
    In the second one, before every epoch, the nearest neighbors vote on the labels, and vote again with the labels that have
    won; from each class, the same number of samples with the largest fraction of the second votes is selected, the median over
    classes of the number of samples whose label wins. Selected samples have the given label, the others the prediction for the
    unaugmented image. The third stage is MOIT+: cross-entropy of mixed weak views of the selected samples with a new
    classifier, after ``bootstrap_after`` epochs with targets between given and predicted class.

    Departures: labels are voted on from the second stage on, where the code does so from the first epoch without use. The
    label of the image that a view is mixed with depends on whether that image is selected; in one term of the code, on whether
    the other one is. Predictions for unaugmented images are those of evaluation mode. The current batch is contrasted in
    addition to the queue, where it takes rows of the queue in the code. The third stage keeps the optimizer, has epochs of the
    usual length, and repeats the selected samples in random order. The policy ``simclr`` crops at least 0.2 of the area, the
    code 0.08.

    With several processes, a batch is contrasted within its process, and with the queue of all processes.

    Under SANM, the masked first view replaces it in the cross-entropy; the contrast uses unmasked views, which requires one
    more pass. Label quality is the fraction of the votes for the given label.

    Args:
        num_classes: C, number of classes.
        warmup_epochs: length of the first stage; published: 130.

    All other arguments are those of :class:`~sanm_lightning.methods.selected_contrast.SelectedContrast`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, num_classes: int, warmup_epochs: int = 130, **kwargs: Any) -> None:
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)

    def memory_payload(self) -> Payload:
        """Return the labels."""
        return {"labels": ((), torch.int64)}

    def views(self) -> tuple[View, ...]:
        """Add the unaugmented image in the second stage."""
        return (*super().views(), "none") if self.stage.name == "select" else super().views()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, _ = self.indexed(batch)
        if self.stage.name == "finetune":
            return self.finetune(batch)
        targets, quality = self.one_hot(batch.labels), None
        if self.stage.name == "select":
            selected, quality = self.detected.selected[batch.index], self.detected.quality[batch.index]
            targets = torch.where(selected[:, None], targets, infer(self.network, batch.views[2])[1].softmax(1))
        loss, views = self.classified_views(batch, targets, quality)
        assert views is not None
        return loss + self.contrast(views, batch.labels)

    def contrast(self, views: MixedViews, labels: Tensor) -> Tensor:
        """Return the contrast of the views with each other, plus that with the queue, to which they are added; a scalar."""
        found, size, queue = views.embeddings, len(views.lam), self.queue
        queued = None if queue is None else (labels[:, None] == queue.labels) & queue.valid
        major, minor = view_positives(labels[:, None] == labels, views.partners, queued)
        near = (major[:, :size], minor[:, :size])
        loss = interpolated_contrast(found, found, views.lam, *near, self.temperature)
        if queue is not None:
            others, valid = queue.behind(found)
            loss = loss + interpolated_contrast(found, others, views.lam, major, minor, self.temperature, valid)
            queue.enqueue(found, labels=labels.repeat(2))
        return loss.mean()
