"""ELR (Liu et al., NeurIPS 2020): early-learning regularization against memorization of wrong labels."""

from typing import Any

from torch import Tensor

from sanm_lightning.functional import clamped_probs, early_learning_regularization
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import require_index
from sanm_lightning.per_sample import EMATargets

__all__ = ["ELR", "require_index"]


class ELR(NoisyLabelModule):
    """Cross-entropy with a regularization of predictions towards their running mean.

    Source: Liu et al., NeurIPS 2020, Algorithm 1, and the authors' code: the mean is updated with the current prediction
    before the loss is computed; probabilities are clamped to [1e-4, 1 - 1e-4]. Published on 45,000 of CIFAR's 50,000
    images, with the others held out for validation: ``data.val_fraction: 0.1``.

    Under SANM, both terms use the masked views; the running mean is that of unmasked images. SANM can reduce the
    accuracy: on 5,000 images of CIFAR-10 with half of the labels wrong, the last accuracy fell from .493 to .393 (three
    seeds). ELR without SANM stopped predicting some classes, and SANM's loss-based quality of their correct labels was
    about .5 (observed on one seed, on which oracle quality did no harm). Check which classes the network predicts.

    Args:
        num_classes: C, number of classes.
        momentum: momentum of the running mean, beta in the paper, in [0, 1).
        weight: weight of the regularization, lambda in the paper, >= 0; 0 is cross-entropy.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    def __init__(self, num_classes: int, momentum: float = 0.7, weight: float = 3.0, **kwargs: Any) -> None:
        if weight < 0:
            raise ValueError(f"expected weight >= 0, got {weight}; use 0 for cross-entropy")
        super().__init__(num_classes, **kwargs)
        self.weight = weight
        self.targets = EMATargets(num_classes, momentum)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        out = self.learn(batch, self.one_hot(batch.labels))
        now = clamped_probs(out.unmasked_logits())
        mean = self.targets.update(index, now / now.sum(1, keepdim=True))
        term = early_learning_regularization(clamped_probs(out.logits), out.per_view(mean))
        return out.cross_entropy() + self.weight * term
