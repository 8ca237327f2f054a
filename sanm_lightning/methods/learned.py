"""Output of one forward pass of a method's network, for its loss."""

from typing import NamedTuple

from torch import Tensor

from sanm_lightning.functional import Mixed, masked_mean, soft_cross_entropy

__all__ = ["Learned"]


class Learned(NamedTuple):
    """Output of :meth:`NoisyLabelModule.learn`. V is the number of views of B samples, one or several per sample."""

    logits: Tensor
    """(V, C), with gradient."""
    targets: Tensor
    """(V, C), class probabilities, mixed like the views."""
    clean_logits: Tensor | None
    """(B, C), of the unmasked, unmixed images, without gradient if masks were sampled; None if not computed."""
    features: Tensor
    """(V, D, h, w), of the views for the decoder."""
    reconstruction: Tensor
    """beta times the reconstruction loss, a scalar; 0 without SANM."""
    mixed: Mixed
    """How the views were mixed."""

    def per_view(self, rows: Tensor) -> Tensor:
        """Repeat rows (B, ...) of the samples for all their views, (V, ...)."""
        copies = len(self.logits) // len(rows)
        return rows if copies == 1 else rows.repeat(copies, *[1] * (rows.ndim - 1))

    def classification(self, weight: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy over views, weighted by ``weight`` (B,), a scalar; 0 if all weights are 0."""
        losses = soft_cross_entropy(self.logits, self.targets)
        return masked_mean(losses, None if weight is None else self.per_view(weight))

    def cross_entropy(self, weight: Tensor | None = None) -> Tensor:
        """Return :meth:`classification` plus the reconstruction term."""
        return self.classification(weight) + self.reconstruction
