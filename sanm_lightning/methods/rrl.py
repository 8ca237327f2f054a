"""RRL (Li, Xiong and Hoi, ICCV 2021): prototypes in a low-dimensional subspace, and labels smoothed over neighbors."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import instance_contrast, mixup_among, prototype_contrast, weight_ramp, zero_term
from sanm_lightning.functional.neighbors import class_means, smoothed_labels, weighted_neighbors
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_choice, check_range, clamped_neighbors
from sanm_lightning.models import Expansion, Projection, pooled_features
from sanm_lightning.per_sample import LabelStore

__all__ = ["RRL"]


class RRL(NoisyLabelModule):
    """Contrast of embeddings with the other view and with class prototypes, on labels that are smoothed over neighbors.

    Source: Li et al., ICCV 2021, Eq. 1 to 9, and the authors' code. Defaults are those of CIFAR-10 with symmetric noise; those
    published for other data sets are in ``configs/setting/rrl``.

    Departures: the first stage has whole epochs (code: 100 steps on CIFAR). Mixed images of samples that are not confident pass
    through the network, with weight 0, where the code leaves them out; batch norm sees them. Means over no sample are 0 (code:
    NaN). The second views are those of ``view`` (code: a form of AugMix with one of three chains).

    Under SANM, masked weak views replace the weak views in the cross-entropy; label quality is the probability of the current
    label in the soft label, before given labels are kept.

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
        check_choice((1, 2), mix_views=mix_views)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.low_threshold, self.high_threshold, self.temperature = low_threshold, high_threshold, temperature
        self.k, self.given_epochs, self.ramp_epochs = k, given_epochs, ramp_epochs
        self.alpha, self.mix_views, self.view = alpha, mix_views, view
        self.w_instance, self.w_prototype, self.w_reconstruction = w_instance, w_prototype, w_reconstruction
        self.projection = Projection(self.network, projection)
        self.expansion = Expansion(self.projection) if w_reconstruction > 0 else None
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
        before = None if new else self.corrected.targets[index]
        near = weighted_neighbors(embeddings, self.k, self.temperature)
        found = smoothed_labels(before, probs, given, *near, self.low_threshold, self.high_threshold)
        self.corrected.update(index, **found._asdict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        labels, confident = self.corrected.labels[index], self.corrected.selected[index]  # at first, given and all
        quality = self.corrected.quality[index] if self.stage.name == "correct" else None
        targets = self.one_hot(labels)
        out = self.learn(batch._replace(labels=labels), targets, quality=quality, unmasked=True)
        loss, weak = out.cross_entropy(confident), pooled_features(self.network, out.unmasked_maps())
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
        return prototype_contrast(embeddings, self.prototypes, mixed.targets, self.temperature, confident)

    def reconstruction(self, features: Tensor) -> Tensor:
        """Return the weighted squared error of features (B, D) that are reconstructed from their projection, a scalar."""
        if self.expansion is None:
            return zero_term(self.projection.parameters())
        return self.w_reconstruction * self.expansion.error(features, self.projection)
