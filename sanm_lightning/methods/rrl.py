"""RRL (Li, Xiong and Hoi, ICCV 2021): prototypes in a low-dimensional subspace, and labels smoothed over neighbors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.batch import View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    class_means,
    instance_contrast,
    keep_given,
    masked_mean,
    mixup_among,
    neighbor_mean,
    soft_cross_entropy,
    weight_ramp,
    weighted_neighbors,
    zero_term,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, clamped_neighbors, require
from sanm_lightning.models import Projection, pooled_features, pooled_width
from sanm_lightning.per_sample import LabelStore

__all__ = ["RRL"]


class RRL(NoisyLabelModule):
    """Contrast of embeddings with the other view and with class prototypes, on labels that are smoothed over neighbors.

    Source: Li et al., ICCV 2021, Eq. 1 to 9, and the authors' code. Defaults are those of CIFAR-10 with symmetric noise; those
    published for other data sets are in ``configs/setting/rrl``.

    Departures: the first stage has whole epochs, where the code takes 100 steps on CIFAR. Of the samples that are not
    confident, the mixed images still pass through the network, with weight 0, where the code leaves them out; batch norm sees
    them. Means over no sample are 0, where those of the code are NaN. The second views are those of ``view``; the code's are
    a form of AugMix with one of three chains.

    Under SANM, masked weak views replace the weak views in the cross-entropy. Label quality is the soft label's probability of
    the class that is learned, before it is set to the given label.

    Args:
        num_classes: C, number of classes.
        low_threshold: probability of the given label above which it is kept, in [0, 1].
        high_threshold: probability above which a sample is confident, in [0, 1].
        k: number of neighbors, without the sample itself, at most the number of other samples; 0 keeps the given labels.
        given_epochs: length of the second stage, with the given labels.
        projection: P, width of the embeddings.
        temperature: temperature, positive.
        alpha: parameter of mixup's Beta distribution, >= 0.
        w_instance: weight of the contrast with the other view, >= 0.
        w_prototype: weight of the contrast with the prototypes, >= 0.
        w_reconstruction: weight of the reconstruction of the features, >= 0.
        ramp_epochs: epochs over which ``w_prototype`` increases from 1 to its value; 0 has no ramp.
        mix_views: number of views that are mixed for the prototypes: 2, or 1 for the weak view only.
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
        check_range("in [0, 1]", low_threshold=low_threshold, high_threshold=high_threshold)
        check_range(">= 0", k=k, given_epochs=given_epochs, alpha=alpha, ramp_epochs=ramp_epochs)
        check_range(">= 0", w_instance=w_instance, w_prototype=w_prototype, w_reconstruction=w_reconstruction)
        check_range(">= 1", projection=projection)
        check_range("> 0", temperature=temperature)
        require(mix_views in (1, 2), "mix_views 1 or 2", mix_views, "use the default")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.low_threshold, self.high_threshold, self.temperature = low_threshold, high_threshold, temperature
        self.k, self.given_epochs, self.ramp_epochs = k, given_epochs, ramp_epochs
        self.alpha, self.mix_views, self.view = alpha, mix_views, view
        self.w_instance, self.w_prototype, self.w_reconstruction = w_instance, w_prototype, w_reconstruction
        self.projection = Projection(self.network, projection)
        self.expansion = nn.Linear(projection, pooled_width(self.network)) if w_reconstruction > 0 else None
        self.corrected = LabelStore(num_classes, dist_reduce_fx=None)
        self.register_state("prototypes", torch.zeros(num_classes, projection))

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
        index, embeddings = found["index"], self.projection(found["features"])
        if self.stage.name == "correct":
            self.correct(index, embeddings, found["logits"].softmax(1), found["labels"])
        labels, confident = self.corrected.labels[index], self.corrected.selected[index]
        self.prototypes = F.normalize(class_means(embeddings, labels, self.num_classes, confident), dim=1)

    def correct(self, index: Tensor, embeddings: Tensor, probs: Tensor, given: Tensor) -> None:
        """Smooth the soft labels of samples ``index`` over their neighbors; a new pool starts from the predictions."""
        new = self.stage_epoch == 0 or len(index) < len(self.corrected)
        before = keep_given(probs, given, self.low_threshold) if new else self.corrected.targets[index]
        smoothed = (neighbor_mean(before, *weighted_neighbors(embeddings, self.k, self.temperature)) + probs) / 2
        targets = keep_given(smoothed, given, self.low_threshold)
        confidence, labels = targets.max(1)
        quality, given_quality = (smoothed.gather(1, part[:, None])[:, 0].clamp(0, 1) for part in (labels, given))
        self.corrected.update(
            index, targets=targets, labels=labels, selected=confidence > self.high_threshold,
            quality=quality, given_quality=given_quality,
        )  # fmt: skip

    # Each step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        store = self.corrected
        labels, confident = store.labels[index], store.selected[index]  # given, and all, before the last stage
        quality = store.quality[index] if self.stage.name == "correct" else None
        targets = self.one_hot(labels)
        out = self.learn(batch._replace(labels=labels), targets, quality=quality, unmasked=True)
        assert out.unmasked is not None
        loss, weak = out.cross_entropy(confident), pooled_features(self.network, out.unmasked)
        if self.stage.name == "warmup":
            return loss + self.reconstruction(weak)
        strong = pooled_features(self.network, self.network.forward_features(batch.views[1]))
        instance = instance_contrast(self.projection(weak), self.projection(strong), self.temperature).mean()
        prototype = self.prototype_contrast(batch.views[: self.mix_views], targets, confident)
        w_prototype = weight_ramp(self.current_epoch - self.warmup_epochs, self.ramp_epochs, self.w_prototype)
        loss = loss + self.w_instance * instance + w_prototype * prototype
        return loss + self.reconstruction(weak) + self.reconstruction(strong)

    def prototype_contrast(self, views: tuple[Tensor, ...], targets: Tensor, confident: Tensor) -> Tensor:
        """Return the cross-entropy of the similarity of mixed views of confident samples to the prototypes, a scalar."""
        targets, confident = targets.repeat(len(views), 1), confident.repeat(len(views))
        mixed = mixup_among(
            torch.cat(views), targets, among=confident, generator=self.stream("mixup"), alpha=self.alpha
        )
        embeddings = self.projection.of_maps(self.network, self.network.forward_features(mixed.images))
        losses = soft_cross_entropy(embeddings @ self.prototypes.T / self.temperature, mixed.targets)
        return masked_mean(losses, confident)

    def reconstruction(self, features: Tensor) -> Tensor:
        """Return the weighted squared error of features (B, D) that are reconstructed from their projection, a scalar."""
        if self.expansion is None:
            return zero_term(self.projection.parameters())
        projected = F.linear(features, self.projection.weight, self.projection.bias)
        return self.w_reconstruction * (F.relu(self.expansion(projected)) - features).square().mean()
