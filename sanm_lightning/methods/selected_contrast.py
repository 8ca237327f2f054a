"""Base class of methods that contrast mixed views, and select samples by votes of neighbors."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch, View
from sanm_lightning.functional import Mixed, MixedViews, soft_cross_entropy, voted_selection, weighted_neighbors
from sanm_lightning.methods.checks import check_range, clamped_neighbors, nonempty_selection
from sanm_lightning.methods.feature_queue import FeatureQueue, Payload
from sanm_lightning.methods.fine_tuned import FineTuned

__all__ = ["SelectedContrast"]


class SelectedContrast(FineTuned):
    """Base class of MOIT and Sel-CL.

    Args:
        num_classes: C, number of classes.
        k: number of neighbors that vote, without the sample itself, at most the number of other samples.
        temperature: temperature of the contrast and of weighted votes, positive.
        quantile: the number of selected samples per class is this quantile over classes of the number of samples whose label
            wins, in [0, 1].
        memory_per_class: rows per class and view of the queue of past embeddings; 0 has no queue.
        memory_after: epochs before this queue is used.
        view: policy of the contrasted views.

    All other arguments are those of :class:`~sanm_lightning.methods.fine_tuned.FineTuned`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    weighted_votes = False
    """Whether the votes of neighbors are weighted by exp(similarity / temperature)."""

    def __init__(
        self,
        num_classes: int,
        k: int = 250,
        temperature: float = 0.1,
        quantile: float = 0.5,
        memory_per_class: int = 100,
        memory_after: int = 3,
        view: str = "simclr",
        **kwargs: Any,
    ) -> None:
        check_range(">= 1", k=k)
        check_range("> 0", temperature=temperature)
        check_range("in [0, 1]", quantile=quantile)
        check_range(">= 0", memory_per_class=memory_per_class, memory_after=memory_after)
        super().__init__(num_classes, **kwargs)
        self.k, self.temperature, self.quantile = k, temperature, quantile
        self.memory_after, self.view = memory_after, view
        rows, dim = 2 * num_classes * memory_per_class, self.projection.out_features
        self.memory = FeatureQueue(rows, dim, self.memory_payload()) if rows else None

    def memory_payload(self) -> Payload:
        """Return shape and dtype of the further values of a row of the queue, by name."""
        return {}

    @property
    def queue(self) -> Any:
        """The queue of past embeddings; None if there is none, or before it is used."""
        return self.memory if self.current_epoch >= self.memory_after else None

    def views(self) -> tuple[View, ...]:
        """Return two views, or in the fine-tuning a weak view, and the unaugmented image for bootstrapping."""
        if self.stage.name != "finetune":
            return (self.view, self.view)
        return ("weak", "none") if self.bootstraps else ("weak",)

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Warn if there are fewer other samples than neighbors."""
        clamped_neighbors(self.k, num_samples, type(self).__name__)

    def begin_stage(self) -> None:
        """Before the fine-tuning, select its samples."""
        if self.stage.name == "finetune":
            self.detect()

    def begin_epoch(self) -> None:
        """Select samples in every epoch of the second stage."""
        if self.stage.name == "select":
            self.detect()

    @torch.no_grad()
    def detect(self) -> None:
        """Let neighbors vote on the given labels, and select the same number of samples per class by the votes."""
        found = self.predict_train("labels", "features", pool_only=True)
        labels, embeddings = found["labels"], self.projection(found["features"]).float()
        near = weighted_neighbors(embeddings, self.k, self.temperature if self.weighted_votes else None)
        share, selected = voted_selection(labels, *near, self.num_classes, self.quantile)
        selected = nonempty_selection(selected, self.current_epoch, type(self).__name__)
        self.detected.update(found["index"], selected=selected, quality=share, given_quality=share)
        self.on_selection(found["index"], embeddings, labels, selected)

    def on_selection(self, index: Tensor, embeddings: Tensor, labels: Tensor, selected: Tensor) -> None:
        """Run after a selection, with embeddings (M, P), labels (M,) and selection (M,) of the samples ``index`` (M,)."""

    def classified_views(
        self, batch: NoisyBatch, targets: Tensor, quality: Tensor | None = None, embed: bool = True
    ) -> tuple[Tensor, MixedViews | None]:
        """Return the loss of the cross-entropy of two mixed views, and with ``embed`` their embeddings.

        Under SANM, the first view is masked for the cross-entropy, not for the embeddings.
        """
        first, second, *_ = batch.views
        out = self.learn(batch.with_images(first), targets, quality=quality, mix=self.mix(1), unmasked=embed)
        mixed: Mixed = self.mix(2)(second, targets)
        maps = self.network.forward_features(mixed.images)
        classification = soft_cross_entropy(self.network.forward_head(maps), mixed.targets).mean()
        loss = (out.classification() + classification) / 2 + out.reconstruction
        if not embed:
            return loss, None
        return loss, self.embedded([out.unmasked_maps(), maps], [out.mixed.of_samples(len(first)), mixed])

    def embedded(self, maps: list[Tensor], mixed: list[Mixed]) -> MixedViews:
        """Return the embeddings of two mixed views from their feature maps (B, D, h, w)."""
        return MixedViews.of([self.projection.of_maps(self.network, part) for part in maps], mixed)
