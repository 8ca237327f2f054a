"""RRL (Li, Xiong and Hoi, ICCV 2021): prototypes in a low-dimensional subspace, and labels smoothed over neighbors."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.callbacks.stages import locate
from sanm_lightning.functional import (
    class_means,
    instance_contrast,
    keep_given,
    masked_mean,
    mixup_among,
    neighbor_mean,
    similar_samples,
    soft_cross_entropy,
    zero_term,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_ranges, clamped_neighbors, require_index
from sanm_lightning.models import Projection, pooled_width
from sanm_lightning.per_sample import LabelStore

__all__ = ["RRL"]


class RRL(NoisyLabelModule):
    """Contrast of embeddings with the other view and with class prototypes, on labels that are smoothed over neighbors.

    Source: Li et al., ICCV 2021, Eq. 1 to 9, and the authors' code. Embeddings are normalized projections from which the
    features are reconstructed. Prototypes are the class means of the embeddings, computed in every epoch. In the last stage,
    before every epoch, the soft label of a sample becomes the mean of its prediction and of the soft labels of its neighbors,
    weighted by exp(similarity / temperature), and the given label if its probability is above ``low_threshold``. Samples whose
    largest probability is above ``high_threshold`` are confident: cross-entropy and prototypes use their most probable class.

    Departures: the first stage has whole epochs, where the code takes 100 steps on CIFAR. Of the samples that are not
    confident, the mixed images still pass through the network, with weight 0, where the code leaves them out; batch norm sees
    them. Means over no sample are 0, where those of the code are NaN. The second views are those of ``view``; the code's are
    a form of AugMix with one of three chains.

    Under SANM, masked weak views replace the weak views in the cross-entropy. Label quality is the soft label's probability of
    the class that is learned, before it is set to the given label.

    Args:
        num_classes: C, number of classes.
        low_threshold: probability of the given label above which it is kept, in [0, 1]; published: CIFAR-10 0.1 with symmetric
            and 0.4 with asymmetric noise, CIFAR-100 0.02, Clothing1M 0.4, WebVision 0.05.
        high_threshold: probability above which a sample is confident, in [0, 1]; published: 0.9, WebVision 0.8.
        k: number of neighbors, without the sample itself, at most the number of other samples; 0 keeps the given labels.
        given_epochs: length of the second stage, with the given labels; published: 5 on CIFAR-10, 15 on CIFAR-100 and
            WebVision, 1 on Clothing1M.
        projection: P, width of the embeddings.
        temperature: temperature, positive.
        alpha: parameter of mixup's Beta distribution, >= 0; published: 8, on Clothing1M and WebVision 0.5.
        w_instance: weight of the contrast with the other view, >= 0.
        w_prototype: weight of the contrast with the prototypes, >= 0; published: 5, Clothing1M 1, WebVision 2.
        w_reconstruction: weight of the reconstruction of the features, >= 0.
        ramp_epochs: epochs over which ``w_prototype`` increases from 1 to its value; 0 has no ramp.
        mix_views: number of views that are mixed for the prototypes: 2, or 1 for the weak view only, as on Clothing1M.
        view: policy of the second views.
        warmup_epochs: length of the first stage, of cross-entropy and reconstruction.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    needs_data_module = True
    estimates_quality = True
    prototypes: Tensor
    """(C, P): normalized class means; 0 for classes without samples."""

    def __init__(
        self,
        num_classes: int,
        low_threshold: float = 0.1,
        high_threshold: float = 0.9,
        k: int = 200,
        given_epochs: int = 5,
        projection: int = 50,
        temperature: float = 0.3,
        alpha: float = 8.0,
        w_instance: float = 1.0,
        w_prototype: float = 5.0,
        w_reconstruction: float = 1.0,
        ramp_epochs: int = 0,
        mix_views: int = 2,
        view: str = "rand_augment",
        warmup_epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        weights = {"w_instance": w_instance, "w_prototype": w_prototype, "w_reconstruction": w_reconstruction}
        check_ranges(
            ("low_threshold in [0, 1]", low_threshold, 0 <= low_threshold <= 1),
            ("high_threshold in [0, 1]", high_threshold, 0 <= high_threshold <= 1),
            ("k >= 0", k, k >= 0),
            ("given_epochs >= 0", given_epochs, given_epochs >= 0),
            ("projection >= 1", projection, projection >= 1),
            ("temperature > 0", temperature, temperature > 0),
            ("alpha >= 0", alpha, alpha >= 0),
            *((f"{name} >= 0", value, value >= 0) for name, value in weights.items()),
            ("ramp_epochs >= 0", ramp_epochs, ramp_epochs >= 0),
            ("mix_views 1 or 2", mix_views, mix_views in (1, 2)),
        )
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.low_threshold, self.high_threshold, self.temperature = low_threshold, high_threshold, temperature
        self.k, self.given_epochs, self.ramp_epochs = k, given_epochs, ramp_epochs
        self.alpha, self.mix_views, self.view = alpha, mix_views, view
        self.w_instance, self.w_prototype, self.w_reconstruction = w_instance, w_prototype, w_reconstruction
        self.projection = Projection(self.network, projection)
        self.expansion = nn.Linear(projection, pooled_width(self.network)) if w_reconstruction > 0 else None
        self.corrected = LabelStore(num_classes, dist_reduce_fx=None)
        self.register_buffer("prototypes", torch.zeros(num_classes, projection))

    def stages(self) -> list[Stage]:
        """Return the stages without contrast, with given labels, and with corrected labels unless ``k`` is 0."""
        given = Stage("given", self.given_epochs if self.k else None)
        return [Stage("warmup", self.warmup_epochs), given, *([Stage("correct")] if self.k else [])]

    def views(self) -> tuple[View, ...]:
        """Return a weak view and, after the first stage, a strong view."""
        return ("weak",) if self.stage.name == "warmup" else ("weak", self.view)

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Warn if there are fewer other samples than neighbors."""
        clamped_neighbors(self.k, num_samples, "RRL")

    # Once per epoch: correct the labels, compute the prototypes

    @torch.no_grad()
    def begin_epoch(self) -> None:
        """Correct the labels in the last stage, and compute the prototypes."""
        if self.stage.name == "warmup":
            return
        found = self.predict_train("labels", "features", "logits", pool_only=True)
        embeddings, labels, confident = self.projection(found["features"]), found["labels"], None
        if self.stage.name == "correct":
            self.correct(found["index"], embeddings, found["logits"].softmax(1), labels)
            store = self.corrected
            labels, confident = store.labels[found["index"]], store.selected[found["index"]]
        self.prototypes = F.normalize(class_means(embeddings, labels, self.num_classes, confident), dim=1)

    def correct(self, index: Tensor, embeddings: Tensor, probs: Tensor, given: Tensor) -> None:
        """Smooth the soft labels of samples ``index`` over their neighbors; a new pool starts from the predictions."""
        first = self.current_epoch == locate(self.stages(), self.current_epoch)[2]
        new = first or len(index) < len(self.corrected)
        targets = keep_given(probs, given, self.low_threshold) if new else self.corrected.targets[index]
        k = min(self.k, len(index) - 1)
        if k:
            neighbors, similarity = similar_samples(embeddings, k)
            targets = neighbor_mean(targets, neighbors, (similarity / self.temperature).softmax(1))
        smoothed = (targets + probs) / 2
        targets = keep_given(smoothed, given, self.low_threshold)
        confidence, labels = targets.max(1)
        quality, given_quality = (smoothed.gather(1, part[:, None])[:, 0].clamp(0, 1) for part in (labels, given))
        self.corrected.update(
            index, targets=targets, labels=labels, selected=confidence > self.high_threshold,
            quality=quality, given_quality=given_quality,
        )  # fmt: skip

    def label_quality(self) -> Tensor | None:
        """Return the smoothed probability of each given label, (N,); None before the first correction."""
        return self.corrected.given_quality if self.corrected.filled else None

    # Each step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        require_index(batch, type(self).__name__)
        labels, confident, quality = batch.labels, torch.ones_like(batch.labels, dtype=torch.bool), None
        if self.stage.name == "correct":
            store = self.corrected
            labels, confident, quality = (part[batch.index] for part in (store.labels, store.selected, store.quality))
        targets = self.one_hot(labels)
        out = self.learn(batch._replace(labels=labels), targets, quality=quality, unmasked=True)
        assert out.unmasked is not None
        loss, weak = out.cross_entropy(confident), self.pooled(out.unmasked)
        if self.stage.name == "warmup":
            return loss + self.reconstruction(weak) + zero_term(self.projection.parameters())
        strong = self.pooled(self.network.forward_features(batch.views[1]))
        instance = instance_contrast(self.projection(weak), self.projection(strong), self.temperature).mean()
        prototype = self.prototype_contrast(batch.views[: self.mix_views], targets, confident)
        loss = loss + self.w_instance * instance + self.prototype_weight * prototype
        return loss + self.reconstruction(weak) + self.reconstruction(strong)

    @property
    def prototype_weight(self) -> float:
        """Weight of the contrast with the prototypes in this epoch."""
        if not self.ramp_epochs:
            return self.w_prototype
        grown = 1 + (self.current_epoch - self.warmup_epochs) * (self.w_prototype - 1) / self.ramp_epochs
        return min(grown, self.w_prototype)

    def prototype_contrast(self, views: tuple[Tensor, ...], targets: Tensor, confident: Tensor) -> Tensor:
        """Return the cross-entropy of the similarity of mixed views of confident samples to the prototypes, a scalar."""
        copies = len(views)
        mix = partial(mixup_among, generator=self.stream("mixup"), alpha=self.alpha)
        mixed = mix(torch.cat(views), targets.repeat(copies, 1), among=confident.repeat(copies))
        embeddings = self.projection(self.pooled(self.network.forward_features(mixed.images)))
        losses = soft_cross_entropy(embeddings @ self.prototypes.T / self.temperature, mixed.targets)
        return masked_mean(losses, confident.repeat(copies))

    def reconstruction(self, features: Tensor) -> Tensor:
        """Return the weighted squared error of features (B, D) that are reconstructed from their projection, a scalar."""
        if self.expansion is None:
            return zero_term(self.projection.parameters())
        projected = F.linear(features, self.projection.weight, self.projection.bias)
        return self.w_reconstruction * (F.relu(self.expansion(projected)) - features).square().mean()

    def pooled(self, maps: Tensor) -> Tensor:
        """Return the pooled features (B, D) of feature maps (B, D, h, w)."""
        features: Tensor = self.network.forward_head(maps, pre_logits=True)
        return features
