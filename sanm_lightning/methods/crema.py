"""After CREMA (Zhang et al., ECCV Workshops 2022): coarse-to-fine credibility of labels."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import clean_probability, sequence_credibility
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.per_sample import History, WeightedLabels

__all__ = ["CREMA", "WeightedLabels"]


class CREMA(NoisyLabelModule):
    """Weight samples by the history of their credibility, and replace labels by stable, confident predictions.

    Source: a recipe after the description of Zhang et al., "Learning from Noisy Labels with Coarse-to-Fine Sample Credibility
    Modeling", ECCV Workshops 2022. No code was released, and this is not a reproduction. Our reading, at the start of every
    epoch after the first stage:

    - The credibility of a label is the probability of the component of smaller losses in a mixture of two Gaussians.
    - Coarse division: labels of a credibility above ``threshold`` are clean, the others noisy.
    - Clean set: the weight of a sample is the geometric mean of its last ``window`` credibilities, the likelihood of the
      sequence per epoch.
    - Noisy set: if the last ``window`` predictions agree and the last one has a probability above ``confidence``, the
      prediction replaces the label, with this probability as weight; other samples have weight 0.
    - The loss is the weighted mean of the cross-entropies of a batch, 0 if all weights are 0.

    Under SANM, label quality is the weight of clean samples, and the probability of the prediction for the others; in lists,
    it is the geometric mean of the credibilities.

    Args:
        num_classes: C, number of classes.
        threshold: credibility above which a label is clean, in [0, 1].
        window: number of epochs of the history, >= 1.
        confidence: probability above which a stable prediction replaces a label, in [0, 1].
        warmup_epochs: length of the first stage, with the given labels.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.5,
        window: int = 3,
        confidence: float = 0.9,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        check_range("in [0, 1]", threshold=threshold, confidence=confidence)
        check_range(">= 1", window=window)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.threshold, self.confidence = threshold, confidence
        self.credibility = History(window, dist_reduce_fx=None)
        self.predicted = History(window, dtype=torch.int64, dist_reduce_fx=None)
        self.judged = WeightedLabels()

    def stages(self) -> list[Stage]:
        """Return the stage with the given labels and that with weights."""
        return [Stage("warmup", self.warmup_epochs), Stage("credibility")]

    def begin_epoch(self) -> None:
        """Append to the histories, divide the samples, and assign labels and weights, after the first stage."""
        if self.stage.name == "warmup":
            return
        found = self.predict_train("loss", "logits", "labels", pool_only=True)
        index, given = found["index"], found["labels"]
        confidence, predicted = found["logits"].softmax(1).max(1)
        score = clean_probability(found["loss"])
        self.credibility.append(index, score)
        self.predicted.append(index, predicted)
        likelihood = sequence_credibility(self.credibility.rows[index], self.credibility.count[index])
        clean = score > self.threshold
        agreed = (self.predicted.rows[index] == predicted[:, None]).all(1)
        stable = agreed & (self.predicted.count[index] >= self.predicted.length) & (confidence > self.confidence)
        self.judged.update(
            index,
            labels=torch.where(~clean & stable, predicted, given),
            weight=torch.where(clean, likelihood, torch.where(stable, confidence, 0.0)),
            quality=torch.where(clean, likelihood, confidence).clamp(0, 1),
            given_quality=likelihood,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        if self.stage.name == "warmup":
            return self.learn(batch, self.one_hot(batch.labels)).cross_entropy()
        labels = self.judged.labels[index]
        out = self.learn(batch._replace(labels=labels), self.one_hot(labels), quality=self.judged.quality[index])
        return out.cross_entropy(self.judged.weight[index])
