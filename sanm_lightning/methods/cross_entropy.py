"""Plain cross-entropy on the given labels: the baseline of every table."""

from typing import Any

from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["CrossEntropy"]


class CrossEntropy(NoisyLabelModule):
    """Cross-entropy on the given labels; under SANM, on masked images and regularized labels (Algorithm 1 of SANM)."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        return self.learn(batch, self.one_hot(batch.labels)).cross_entropy()
