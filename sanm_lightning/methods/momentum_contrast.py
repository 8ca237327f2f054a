"""Contrast with keys of an averaged network (MoCo), as a part of methods."""

from typing import Any

from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.functional import queue_contrast
from sanm_lightning.methods.ema import EMA
from sanm_lightning.methods.feature_queue import FeatureQueue
from sanm_lightning.methods.hooks import MethodHooks
from sanm_lightning.models import Projection
from sanm_lightning.sanm.inference import inference_context

__all__ = ["MomentumContrast"]


class MomentumContrast(MethodHooks):
    """Mixin with a key encoder, an average of network and projection, and a queue of its embeddings.

    Source: He et al., CVPR 2020, Algorithm 1. With several processes, a batch is contrasted with the keys of all.
    """

    network: Any
    projection: Projection
    temperature: float

    def add_key_encoder(self, negatives: int, decay: float) -> None:
        """Create the key encoder from the current weights.

        Args:
            negatives: number of keys in the queue.
            decay: weight of the old average in an update, in [0, 1).
        """
        self.key_network, self.key_projection = EMA(self.network, decay), EMA(self.projection, decay)
        self.negatives = FeatureQueue(negatives, self.projection.out_features)

    def key(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, P) and class probabilities (B, C) by the key encoder, without gradient."""
        network: Any = self.key_network.module
        projection: Any = self.key_projection.module
        with inference_context(network, images, batch_statistics=True):
            maps = network.forward_features(images)
            return projection.of_maps(network, maps), network.forward_head(maps).float().softmax(1)

    def unsupervised(self, batch: NoisyBatch) -> Tensor:
        """Return the contrast (B,) of first views with the keys of second views, which are added to the queue."""
        queries = self.projection.of_maps(self.network, self.network.forward_features(batch.views[0]))
        keys, _ = self.key(batch.views[1])
        losses = queue_contrast(queries, keys, self.negatives.features, self.negatives.valid, self.temperature)
        self.negatives.enqueue(keys)
        return losses

    def after_optimizer_step(self) -> None:
        """Update the key encoder."""
        self.key_network.update(self.network)
        self.key_projection.update(self.projection)
