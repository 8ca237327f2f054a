"""PLC (Zhang et al., ICLR 2021): progressive label correction."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import label_ratio
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.per_sample import History, LabelStore

__all__ = ["PLC"]


class PLC(NoisyLabelModule):
    """Cross-entropy with labels that are replaced where the network contradicts them confidently.

    Source: Zhang et al., ICLR 2021, and the authors' code. After the first stage, at the start of every epoch, the label y of
    a sample becomes the most probable class of its mean prediction over the last epochs, if the ratio of the probability of y
    to the largest one is below a threshold. The threshold increases by a step, to at most 0.9, when fewer than a thousandth of
    the labels change. The code uses this rule, where Algorithm 1 of the paper is stated for two classes.

    Departure: samples without predictions keep their labels, where the code gives them a class.

    Under SANM, label quality is this ratio for the current label; in lists, for the given label.

    Args:
        num_classes: C, number of classes.
        threshold: initial threshold of the ratio, in (0, 1); published: 0.3, on Clothing1M 0.7, on Food-101N 0.1.
        threshold_step: increase of the threshold, in (0, 1); published: 0.1, on Food-101N 0.05.
        window: epochs whose predictions are averaged; published: 5, on Animal-10N 10, on Food-101N 4.
        softmax_of_mean: the authors' code for Clothing1M: the softmax is applied to the mean probabilities, in which missing
            predictions count as zeros; labels whose sample has no value of 0.1 or more are replaced whatever the ratio; and
            the threshold increases only when no label is below it, without an upper bound.
        warmup_epochs: length of the first stage, without corrections; published: 8. The code corrects labels first after one
            epoch more than its ``warm_up``.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    needs_data_module = True
    estimates_quality = True
    threshold: Tensor
    """Current threshold, a scalar, float64."""

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.3,
        window: int = 5,
        softmax_of_mean: bool = False,
        warmup_epochs: int = 8,
        threshold_step: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"expected threshold in (0, 1), got {threshold}; use 0.3")
        if not 0 < threshold_step < 1:
            raise ValueError(f"expected threshold_step in (0, 1), got {threshold_step}; use 0.1")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.softmax_of_mean, self.threshold_step = softmax_of_mean, threshold_step
        self.predicted = History(window, (num_classes,))
        self.corrected = LabelStore(dist_reduce_fx=None)
        self.register_state("threshold", torch.tensor(threshold, dtype=torch.float64), cast=False)

    def stages(self) -> list[Stage]:
        """Return the stage without and the stage with corrections."""
        return [Stage("warmup", self.warmup_epochs), Stage("correct")]

    def begin_epoch(self) -> None:
        """Correct the labels, and increase the threshold if few of them change."""
        if self.stage.name == "warmup":
            return
        mean, seen = self.predicted.mean(), self.predicted.count > 0
        certain = torch.ones_like(seen)
        if self.softmax_of_mean:
            filled = self.predicted.count.clamp(max=self.predicted.length) / self.predicted.length
            mean = (filled[:, None] * mean).softmax(1)
            certain = mean.amax(1) >= 0.1
        given, labels = self.given_labels, self.corrected.labels
        contradicted = certain & seen & (label_ratio(mean, labels) < self.threshold)
        labels = torch.where(contradicted | (seen & ~certain), mean.argmax(1), labels)
        quality, given_quality = (torch.where(seen, label_ratio(mean, held), 1.0) for held in (labels, given))
        self.corrected.update(labels=labels, quality=quality, given_quality=given_quality)
        flips = int(contradicted.sum())
        if self.softmax_of_mean:
            self.threshold += self.threshold_step * (flips == 0)
        elif flips < 0.001 * len(labels):
            self.threshold = (self.threshold + self.threshold_step).clamp(max=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        labels = self.corrected.labels[index]
        quality = None if self.stage.name == "warmup" else self.corrected.quality[index]
        out = self.learn(batch._replace(labels=labels), self.one_hot(labels), quality=quality)
        self.predicted.append(index, out.unmasked_logits().float().softmax(1))
        return out.cross_entropy()
