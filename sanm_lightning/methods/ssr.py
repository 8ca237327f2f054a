"""SSR (Feng, Tzimiropoulos and Patras, BMVC 2022): sample selection by a k-NN vote, relabeling by confidence."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    balanced_votes,
    feature_consistency,
    fit_mixture,
    knn_vote,
    mixture_posterior,
    mixup,
    relabel,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import balanced_batches, permuted_batches
from sanm_lightning.methods.checks import check_choice, check_range, nonempty_selection
from sanm_lightning.models import pooled_features, pooled_width
from sanm_lightning.per_sample import LabelStore

__all__ = ["SSR"]


class SSR(NoisyLabelModule):
    """Relabel and select samples once per epoch; train on selected samples and on the feature consistency of all.

    Source: Feng et al., BMVC 2022, and the authors' code. One network, no warm-up.

    Departures. Features and predictions of the whole set are those of unaugmented images, where the code uses weak
    views. Each sample of a step is sampled by class, then among the selected samples of that class; the code iterates
    over the selected samples with every class repeated to the size of the largest. If the selection is empty, all
    samples are used, with a warning. With ``lambda_fc`` 0, the passes of the feature consistency are omitted; in the
    code, they update the running statistics of batch norm.

    Under SANM, both strong views of the selected samples are masked and their labels regularized, then mixed. Label
    quality is computed from the votes for the label; the selection score is 1 for every selected sample and would mask
    nothing. A fraction of the votes ranks labels but is not a probability: where neighbors disagree, correct labels win
    with .4 of the votes, wrong ones with .3, and SANM would mask and soften both almost equally. A mixture of two
    Gaussians on all fractions, as DivideMix fits to losses, gives a probability.

    Args:
        num_classes: C, number of classes.
        theta_s: score from which on a sample is selected, in [0, 1]; 1: its label wins the vote.
        theta_r: confidence above which the predicted class replaces the given label, in [0, 1].
        k: number of neighbors that vote, including the sample.
        alpha: parameter of mixup's Beta distribution, >= 0.
        lambda_fc: weight of the feature consistency, >= 0; 1 is the authors' SSR+, 0 their SSR.
        hidden: hidden width of the two heads of the feature consistency.
        strong_view: data-module policy of the strong views; ``"auto_augment_ssr"`` is that of the authors' code.
        vote_quality: label quality for SANM: ``"mixture"``, the probability that the label's fraction of the votes
            belongs to the component of larger fractions; or ``"share"``, the fraction itself.
        warmup_epochs: initial epochs of cross-entropy; published: none.
        chunk: number of samples whose neighbors are searched at once.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, there are fewer training samples than neighbors, or (with
            ``lambda_fc``) a batch has one sample only.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        theta_s: float = 1.0,
        theta_r: float = 0.9,
        k: int = 200,
        alpha: float = 4.0,
        lambda_fc: float = 1.0,
        hidden: int = 256,
        strong_view: str = "auto_augment",
        vote_quality: Literal["mixture", "share"] = "mixture",
        warmup_epochs: int = 0,
        chunk: int = 1024,
        **kwargs: Any,
    ) -> None:
        check_range("in [0, 1]", theta_s=theta_s, theta_r=theta_r)
        check_range(">= 1", k=k, hidden=hidden, chunk=chunk)
        check_range(">= 0", alpha=alpha, lambda_fc=lambda_fc)
        check_choice(("mixture", "share"), vote_quality=vote_quality)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.theta_s, self.theta_r, self.k, self.chunk = theta_s, theta_r, k, chunk
        self.alpha, self.lambda_fc, self.strong_view, self.vote_quality = alpha, lambda_fc, strong_view, vote_quality
        self.selection = LabelStore(dist_reduce_fx=None)
        if lambda_fc > 0:
            self.projection = _head(pooled_width(self.network), hidden)
            self.predictor = _head(128, hidden)

    def stages(self) -> list[Stage]:
        """Return the warm-up, if there is one, and the selection."""
        return [Stage("warmup", self.warmup_epochs), Stage("selection")]

    def views(self) -> tuple[View, ...]:
        """Return two strong views of the selected samples, and a weak and a strong view of all samples."""
        strong = self.strong_view
        if self.stage.name == "warmup":
            return ("weak", strong) if self.lambda_fc > 0 else ("weak",)
        return ((strong, "weak"), strong) if self.lambda_fc > 0 else (strong, strong)

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Require at least ``k`` samples and, for the batch norm of the heads, at least 2 samples per step."""
        if num_samples < self.k:
            raise ValueError(
                f"expected at least k = {self.k} training samples, one per neighbor, got {num_samples}; lower k (--model.k)"
            )
        if self.lambda_fc > 0 and min(batch_size, -(-num_samples // world_size)) == 1:
            raise ValueError(
                "expected at least 2 samples per step and process for the batch norm in the heads of the feature "
                "consistency, got 1; raise data.batch_size, use fewer processes, or set lambda_fc: 0"
            )

    # Once per epoch: relabel, vote, select

    def begin_epoch(self) -> None:
        """Relabel and select, after the warm-up."""
        if self.stage.name == "warmup":
            return
        found = self.predict_train("labels", "features", "logits", pool_only=True)
        given, features = found["labels"], found["features"]
        if len(given) < self.k:
            raise ValueError(
                f"expected at least k = {self.k} samples in the pool of an epoch, one per neighbor, got {len(given)}; raise "
                "data.samples_per_epoch, or lower k"
            )
        labels = relabel(given, found["logits"].softmax(1), self.theta_r)
        votes = balanced_votes(knn_vote(features, labels, self.k, self.num_classes, self.chunk), labels)
        agreeing, given_agreeing = (votes.gather(1, part[:, None])[:, 0] for part in (labels, given))
        selected = agreeing / votes.max(1).values >= self.theta_s
        selected = nonempty_selection(selected, self.current_epoch, type(self).__name__)
        quality, given_quality = self._judge(agreeing, given_agreeing)
        judged = {"labels": labels, "selected": selected, "quality": quality, "given_quality": given_quality}
        self.selection.update(found["index"], **judged)

    def _judge(self, agreeing: Tensor, given_agreeing: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quality of current and given labels from their fractions of the votes, (N,), in [0, 1]."""
        if self.vote_quality == "share":
            return agreeing, given_agreeing
        mixture = fit_mixture(1 - agreeing)  # the component of lower mean has the larger fractions
        return mixture_posterior(mixture, 1 - agreeing), mixture_posterior(mixture, 1 - given_agreeing)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Sample selected samples with balanced classes, and all samples in random rounds for the consistency."""
        if self.stage.name == "warmup":
            return None
        labels, selected = self.selection.labels.cpu(), self.selection.selected.cpu()
        pool = plan.pool(0)
        chosen = pool[selected[pool]] if bool(selected[pool].any()) else pool
        size, own = plan.step_size(pool), self.epoch_stream(plan, "draw", plan.rank)
        drawn = balanced_batches(plan, chosen, labels[chosen], self.num_classes, size, own)
        if self.lambda_fc == 0:
            return drawn
        return torch.cat([drawn, permuted_batches(plan, pool, size, self.epoch_stream(plan, "turn"))], 1)

    # Each step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        if self.stage.name == "warmup":
            loss, every = self.learn(batch, self.one_hot(batch.labels)).cross_entropy(), batch
        else:
            drawn, every = batch.chunk(2) if self.lambda_fc > 0 else (batch, batch)
            loss = self.mixed_cross_entropy(drawn)
        return loss + self.lambda_fc * self.consistency(*every.views) if self.lambda_fc > 0 else loss

    def mixed_cross_entropy(self, batch: NoisyBatch) -> Tensor:
        """Return the cross-entropy of mixed strong views of selected samples, with the labels of the selection."""
        labels, quality = (part[batch.index].repeat(2) for part in (self.selection.labels, self.selection.quality))
        views = batch.with_images(torch.cat(batch.views))._replace(labels=labels)
        mix = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha)
        return self.learn(views, self.one_hot(labels), quality=quality, mix=mix).cross_entropy()

    def consistency(self, weak: Tensor, strong: Tensor) -> Tensor:
        """Return the feature consistency of a weak and a strong view of the same images."""
        with torch.no_grad():
            target = self.projection(pooled_features(self.network, self.network.forward_features(weak)))
        features = pooled_features(self.network, self.network.forward_features(strong))
        return feature_consistency(self.predictor(self.projection(features)), target)


def _head(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 128))
