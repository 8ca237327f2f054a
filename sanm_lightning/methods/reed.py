"""After REED (Zhang and Yao, 2020): divide the data by a classifier on frozen features, and retrain semi-supervised."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    clean_probability,
    linear_ramp,
    mixmatch_loss,
    mixup,
    sharpen,
    soft_cross_entropy,
    squared_error,
    threshold_split,
    weighted_neighbors,
    zero_term,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import balanced_batches, permuted_batches
from sanm_lightning.methods.checks import check_range, require_divisible
from sanm_lightning.methods.encoder import load_encoder
from sanm_lightning.models import pooled_features
from sanm_lightning.per_sample import NeighborGraph
from sanm_lightning.sanm.inference import infer, inference_context

__all__ = ["REED"]


class REED(NoisyLabelModule):
    """Train a classifier on frozen self-supervised features, divide the data by its losses, and retrain with MixMatch.

    Source: a recipe after the description of Zhang and Yao, "Decoupling Representation and Classifier for Noisy Label
    Learning", 2020. No code was released, and this is not a reproduction; ``docs/methods/reed.md`` lists our reading.

    Under SANM, the views that are mixed are masked, as for :class:`C2D`; label quality is the probability of the mixture.

    Args:
        num_classes: C, number of classes.
        pretrained: file of the pre-trained encoder, as for :class:`C2D`. Required to start training, but not to resume a run
            or to load a checkpoint.
        p_threshold: probability above which a label is used, in [0, 1].
        k: number of neighbors, >= 1; all other samples if there are fewer.
        graph_weight: weight of the graph term, >= 0.
        lambda_u: weight of the squared error of samples without labels, >= 0.
        temperature: temperature of the sharpening, positive.
        alpha: parameter of mixup's Beta distribution, >= 0.
        ramp_epochs: epochs of the second stage over which ``lambda_u`` increases from 0, >= 0.
        warmup_epochs: length of the first stage.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, training starts without ``pretrained``, the file does not contain all
            tensors of the network except its classifier, or there are fewer than 2 training samples.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        pretrained: str | None = None,
        p_threshold: float = 0.5,
        k: int = 10,
        graph_weight: float = 1.0,
        lambda_u: float = 25.0,
        temperature: float = 0.5,
        alpha: float = 4.0,
        ramp_epochs: float = 16.0,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        check_range("in [0, 1]", p_threshold=p_threshold)
        check_range(">= 1", k=k)
        check_range(">= 0", graph_weight=graph_weight, lambda_u=lambda_u, alpha=alpha, ramp_epochs=ramp_epochs)
        check_range("> 0", temperature=temperature)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.pretrained, self.p_threshold, self.k, self.graph_weight = pretrained, p_threshold, k, graph_weight
        self.lambda_u, self.temperature, self.alpha, self.ramp_epochs = lambda_u, temperature, alpha, ramp_epochs
        self.graph = NeighborGraph(num_classes, k)

    def setup(self, stage: str) -> None:
        """Load the pre-trained encoder, unless the run is resumed."""
        if stage == "fit":
            load_encoder(self, self.pretrained)

    def stages(self) -> list[Stage]:
        """Return the stage of the classifier and that of the whole network."""
        return [Stage("warmup", self.warmup_epochs, trained="head"), Stage("mixmatch")]

    def views(self) -> tuple[View, ...]:
        """Return one view for the classifier, and two for MixMatch."""
        return ("weak",) if self.stage.name == "warmup" else ("weak", "weak")

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Require at least 2 training samples."""
        require_divisible(num_samples, type(self).__name__)

    def begin_stage(self) -> None:
        """Divide the samples by their losses, and find their neighbors."""
        found = self.predict_train("loss", "logits", "features", pool_only=True)
        index, quality = found["index"], clean_probability(found["loss"])
        selected, _ = threshold_split(quality, self.p_threshold)
        self.graph.update(index, selected=selected, given_quality=quality, probs=found["logits"].softmax(1))
        neighbors, _ = weighted_neighbors(found["features"], self.k)
        self.graph.connect(index, neighbors)
        if (k := neighbors.shape[1]) < self.k:
            rank_zero_info(f"REED: each sample has {k} instead of k = {self.k} neighbors, all other samples")

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Sample half a batch with labels, with balanced classes, and half a batch without labels per step."""
        if self.stage.name == "warmup":
            return None
        half, pool = max(1, plan.batch_size // 2), plan.pool(0)
        selected = self.graph.selected.cpu()[pool]
        labelled, unlabelled = (part if len(part) else pool for part in (pool[selected], pool[~selected]))
        labels, own = self.given_labels.cpu()[labelled], self.epoch_stream(plan, "draw", plan.rank)
        drawn = balanced_batches(plan, labelled, labels, self.num_classes, half, own)
        return torch.cat([drawn, permuted_batches(plan, unlabelled, half, self.epoch_stream(plan, "refined"))], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        return self.classify(batch) if self.stage.name == "warmup" else self.mixmatch(batch, index, batch_idx)

    def classify(self, batch: NoisyBatch) -> Tensor:
        """Return the cross-entropy of the classifier on frozen features."""
        with inference_context(self.network, batch.images):
            features = pooled_features(self.network, self.network.forward_features(batch.images))
        logits = self.network.get_classifier()(features.detach())
        loss = soft_cross_entropy(logits, self.one_hot(batch.labels)).mean()
        return loss + zero_term(self.parameters()) if self.trainer.world_size > 1 else loss

    def mixmatch(self, batch: NoisyBatch, index: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of half a batch with labels and half a batch without."""
        half = len(index) // 2
        first = torch.arange(2 * half, device=index.device) < half
        maps, logits = zip(*(infer(self.network, view, batch_statistics=True) for view in batch.views), strict=True)
        mean = torch.stack([part.softmax(1) for part in logits]).mean(0)
        targets = torch.where(first[:, None], self.one_hot(batch.labels), sharpen(mean, self.temperature))
        near, quality = self.graph.neighbor_mean(index), self.graph.given_quality[index]
        mix = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha)
        views = batch.with_images(torch.cat(batch.views))
        out = self.learn(views, targets.repeat(2, 1), quality=quality.repeat(2), features=torch.cat(maps), mix=mix)
        self.graph.write("probs", index, mean)
        supervised, unsupervised = mixmatch_loss(out.logits, out.targets, out.per_view(first.repeat(2)))
        graph = squared_error(out.logits, out.mixed.mix(out.per_view(near.repeat(2, 1)))).mean()
        lambda_u = self.lambda_u * linear_ramp(self.elapsed_epochs(batch_idx), self.ramp_epochs)
        return supervised + lambda_u * unsupervised + self.graph_weight * graph + out.reconstruction
