"""Plain cross-entropy on the given labels: the baseline of every table."""

from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule

__all__ = ["CrossEntropy"]


class CrossEntropy(NoisyLabelModule):
    """Cross-entropy on the given labels; under SANM, on masked images and regularised labels (Algorithm 1 of SANM)."""

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch(*batch)
        targets = self.one_hot(batch.labels)
        views = self.sanm(self.network, batch.images, targets, self.quality(batch, targets))
        features = self.network.forward_features(views.images)
        logits = self.network.forward_head(features)
        self.observe(batch, views.unmasked(logits), targets)
        return F.cross_entropy(logits, views.targets) + self.sanm.reconstruction(features, batch.images)
