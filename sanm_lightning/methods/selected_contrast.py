"""Base class of methods that contrast mixed views, select samples by votes of neighbors, and then fine-tune on them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    Mixed,
    MixedViews,
    class_quota,
    co_refine,
    corrected_votes,
    mixup,
    soft_cross_entropy,
    weighted_neighbors,
    zero_term,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import permuted_batches
from sanm_lightning.methods.checks import check_range, clamped_neighbors, nonempty_selection
from sanm_lightning.models import Projection
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.random_streams import named_generator
from sanm_lightning.sanm.inference import inference_context

__all__ = ["SelectedContrast"]


class SelectedContrast(NoisyLabelModule):
    """Base class of MOIT and Sel-CL.

    Args:
        num_classes: C, number of classes.
        k: number of neighbors that vote, without the sample itself, at most the number of other samples.
        projection: P, width of the embeddings.
        temperature: temperature of the contrast and of weighted votes, positive.
        alpha: parameter of mixup's Beta distribution, >= 0.
        quantile: the number of selected samples per class is this quantile over classes of the number of samples whose label
            wins, in [0, 1].
        memory_per_class: rows per class and view of the queue of past embeddings; 0 has no queue.
        memory_after: epochs before this queue is used.
        select_epochs: length of the second stage, followed by the fine-tuning; None has no fine-tuning.
        finetune_lr: learning rate of the fine-tuning; published: 0.001. None uses the optimizer's with its schedule.
        bootstrap_after: epochs of the fine-tuning without bootstrapping.
        bootstrap: weight of the predicted class in the bootstrapping, in [0, 1].
        view: policy of the contrasted views.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    needs_data_module = True
    estimates_quality = True
    weighted_votes = False
    """Whether the votes of neighbors are weighted by exp(similarity / temperature)."""

    def __init__(
        self,
        num_classes: int,
        k: int = 250,
        projection: int = 128,
        temperature: float = 0.1,
        alpha: float = 1.0,
        quantile: float = 0.5,
        memory_per_class: int = 100,
        memory_after: int = 3,
        select_epochs: int | None = None,
        finetune_lr: float | None = None,
        bootstrap_after: int = 30,
        bootstrap: float = 0.2,
        view: str = "simclr",
        **kwargs: Any,
    ) -> None:
        check_range(">= 1", k=k, projection=projection)
        check_range(">= 1 or null", select_epochs=select_epochs)
        check_range("> 0", temperature=temperature)
        check_range("> 0 or null", finetune_lr=finetune_lr)
        check_range(">= 0", alpha=alpha, bootstrap_after=bootstrap_after)
        check_range(">= 0", memory_per_class=memory_per_class, memory_after=memory_after)
        check_range("in [0, 1]", quantile=quantile, bootstrap=bootstrap)
        super().__init__(num_classes, **kwargs)
        self.k, self.temperature, self.alpha, self.quantile, self.view = k, temperature, alpha, quantile, view
        self.memory_rows, self.memory_after = 2 * num_classes * memory_per_class, memory_after
        self.select_epochs, self.finetune_lr = select_epochs, finetune_lr
        self.bootstrap_after, self.bootstrap = bootstrap_after, bootstrap
        self.projection = Projection(self.network, projection)
        self.detected = LabelStore(dist_reduce_fx=None)

    def stages(self) -> list[Stage]:
        """Return the stages without and with selected samples, and the fine-tuning, if there is one."""
        found = [Stage("warmup", self.warmup_epochs), Stage("select", self.select_epochs)]
        if self.select_epochs is not None:
            found.append(Stage("finetune", reset="head", lr=self.finetune_lr, frozen=("projection",)))
        return found

    def views(self) -> tuple[View, ...]:
        """Return two views, or in the fine-tuning a weak view, and the unaugmented image for bootstrapping."""
        if self.stage.name != "finetune":
            return (self.view, self.view)
        return ("weak", "none") if self.bootstraps else ("weak",)

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Warn if there are fewer other samples than neighbors."""
        clamped_neighbors(self.k, num_samples, type(self).__name__)

    # Once per epoch: vote and select

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
        neighbors, weights = weighted_neighbors(embeddings, self.k, self.temperature if self.weighted_votes else None)
        votes = corrected_votes(labels, neighbors, self.num_classes, weights)
        share = votes.gather(1, labels[:, None])[:, 0]
        share = share.nan_to_num(0.01).clamp(0.01, 0.99)  # NaN: the network has diverged
        selected = class_quota(-share, labels, votes.argmax(1) == labels, self.num_classes, self.quantile)
        selected = nonempty_selection(selected, self.current_epoch, type(self).__name__)
        self.detected.update(found["index"], selected=selected, quality=share, given_quality=share)
        self.on_selection(found["index"], embeddings, labels, selected)

    def on_selection(self, index: Tensor, embeddings: Tensor, labels: Tensor, selected: Tensor) -> None:
        """Run after a selection, with embeddings (M, P), labels (M,) and selection (M,) of the samples ``index`` (M,)."""

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Sample selected samples in the fine-tuning."""
        return self.drawn_rows(plan, selected=True) if self.stage.name == "finetune" else None

    def drawn_rows(self, plan: EpochPlan, selected: bool) -> Tensor:
        """Return positions (S, B) of this process in random rounds of the pool, or of the selected samples in it."""
        pool = plan.pool(0)
        size = min(plan.batch_size, -(-len(pool) // plan.world_size))
        chosen = pool[self.detected.selected.cpu()[pool]] if selected else pool
        seed, epoch = self.sanm.seed, plan.draw_epoch
        generator = named_generator("draw", seed, epoch) if selected else named_generator("round", seed, epoch)
        return permuted_batches(plan, chosen if len(chosen) else pool, size, generator)

    # Each step

    def mix(self, number: int) -> Any:
        """Return the function that mixes a view, with its own random weight, at least 1/2."""
        return partial(mixup, generator=self.stream("mixup", number), alpha=self.alpha)

    def classified_views(
        self, batch: NoisyBatch, targets: Tensor, quality: Tensor | None = None, embed: bool = True
    ) -> tuple[Tensor, MixedViews | None]:
        """Return the loss of the cross-entropy of two mixed views, and with ``embed`` their embeddings.

        Under SANM, the first view is masked for the cross-entropy, not for the embeddings.
        """
        first, second, *_ = batch.views
        net = self.network
        out = self.learn(batch.with_images(first), targets, quality=quality, mix=self.mix(1), unmasked=embed)
        mixed: Mixed = self.mix(2)(second, targets)
        maps = net.forward_features(mixed.images)
        classification = soft_cross_entropy(net.forward_head(maps), mixed.targets).mean()
        loss = (out.classification() + classification) / 2 + out.reconstruction
        if out.unmasked is None:
            return loss, None
        embeddings = [self.projection.of_maps(net, part) for part in (out.unmasked, maps)]
        return loss, MixedViews.of(embeddings, [out.mixed.of_samples(len(first)), mixed])

    @property
    def bootstraps(self) -> bool:
        """Whether the predicted class is learned in this epoch of the fine-tuning."""
        return self.stage_epoch >= self.bootstrap_after

    def finetune(self, batch: NoisyBatch) -> Tensor:
        """Return the cross-entropy of mixed weak views, with targets between the given label and the predicted class."""
        targets = self.one_hot(batch.labels)
        if self.bootstraps:
            predicted = self.one_hot(self.predicted(batch.views[1]).argmax(1))
            targets = co_refine(targets, torch.full_like(targets[:, 0], 1 - self.bootstrap), predicted)
        out = self.learn(batch, targets, quality=self.detected.quality[batch.index], mix=self.mix(1))
        return out.cross_entropy() + zero_term(self.projection.parameters())

    def predicted(self, images: Tensor) -> Tensor:
        """Return class probabilities (B, C) of images, without gradient, in evaluation mode."""
        with inference_context(self.network, images):
            probs: Tensor = self.network(images).float().softmax(1)
        return probs
