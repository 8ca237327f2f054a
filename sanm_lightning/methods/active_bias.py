"""ActiveBias (Chang et al., NeurIPS 2017): samples are weighted by the variance of their predictions."""

from typing import Any

from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import uncertainty_weights
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.per_sample import RunningVariance

__all__ = ["ActiveBias"]


class ActiveBias(NoisyLabelModule):
    """Cross-entropy weighted by how much the predicted probability of the given label varies over training.

    Source: Chang et al., NeurIPS 2017, "SGD-WPV", Eq. 3, with mean and variance of all earlier visits instead of a list.
    Weights have mean 1 in a batch.

    Departure: a sample of fewer than two visits gets the smallest weight, where the formula divides by 0.

    Under SANM, the weights multiply the losses of the masked views; probabilities are those of unmasked images. The variance
    is no estimate of label quality, because it is large for wrong labels and for difficult samples.

    Args:
        num_classes: C, number of classes.
        smoothing: added to every weight before the normalization, positive; published: 0.2 in the comparison of SELFIE.
        warmup_epochs: length of the first stage, in which all samples have the same weight.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    def __init__(self, num_classes: int, smoothing: float = 0.2, warmup_epochs: int = 25, **kwargs: Any) -> None:
        if smoothing <= 0:
            raise ValueError(f"expected smoothing > 0, got {smoothing}; use 0.2")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.smoothing = smoothing
        self.probability = RunningVariance()

    def stages(self) -> list[Stage]:
        """Return the stage without and the stage with weights."""
        return [Stage("warmup", self.warmup_epochs), Stage("weighted")]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        labels = self.one_hot(batch.labels)
        weight = None
        if self.stage.name == "weighted":
            weight = uncertainty_weights(self.probability.var(index), self.probability.count[index], self.smoothing)
        out = self.learn(batch, labels)
        probability = (out.unmasked_logits().float().softmax(1) * labels).sum(1)
        self.probability.update(index, probability)
        return out.cross_entropy(weight)
