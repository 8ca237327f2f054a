"""GCE (Zhang and Sabuncu, NeurIPS 2018): generalized cross-entropy."""

from typing import Any

from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.functional import generalized_cross_entropy
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["GCE"]


class GCE(NoisyLabelModule):
    """Generalized cross-entropy, between cross-entropy and mean absolute error, which is more robust to wrong labels.

    Source: Zhang and Sabuncu, NeurIPS 2018, Eq. 6. Not the truncated variant of their Section 3.3.

    Under SANM, the loss is the expectation over the regularized target of the masked view.

    Args:
        num_classes: C, number of classes.
        q: in (0, 1]; the limit 0 is cross-entropy, 1 is mean absolute error. Published: 0.7.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, num_classes: int, q: float = 0.7, **kwargs: Any) -> None:
        if not 0 < q <= 1:
            raise ValueError(f"expected q in (0, 1], got {q}; use CrossEntropy for q = 0")
        super().__init__(num_classes, **kwargs)
        self.q = q

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        out = self.learn(batch, self.one_hot(batch.labels))
        return generalized_cross_entropy(out.logits, out.targets, self.q).mean() + out.reconstruction
