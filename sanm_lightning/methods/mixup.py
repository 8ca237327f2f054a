"""Mixup (Zhang et al., ICLR 2018): training on convex combinations of image pairs and of their labels."""

from functools import partial
from typing import Any

from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.functional import mixup
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["Mixup"]


class Mixup(NoisyLabelModule):
    """Cross-entropy on mixed images with mixed labels, which slows the memorization of wrong labels.

    Source: Zhang et al., ICLR 2018, Eq. 1, and the authors' code: one weight per batch, in [0, 1].

    Under SANM, masked views and regularized targets are mixed; the reconstruction uses a separate forward pass on the
    masked, unmixed views.

    Args:
        num_classes: C, number of classes.
        alpha: parameter of the weight's distribution Beta(alpha, alpha), >= 0. 1 in the authors' code; larger values, such as
            8 to 32, are used with wrong labels.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, num_classes: int, alpha: float = 1.0, **kwargs: Any) -> None:
        if alpha < 0:
            raise ValueError(f"expected alpha >= 0, got {alpha}; use CrossEntropy for no mixing")
        super().__init__(num_classes, **kwargs)
        self.alpha = alpha

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        mix = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha, larger_half=False)
        return self.learn(batch, self.one_hot(batch.labels), mix=mix).cross_entropy()
