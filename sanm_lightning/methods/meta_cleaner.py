"""A method after MetaCleaner (Zhang et al., CVPR 2019): weighted mean features of several images with one label."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sanm_lightning.batch import EpochPlan
from sanm_lightning.functional import class_sets, members_by_class, soft_cross_entropy
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.models.pooled import pooled_width
from sanm_lightning.per_sample import LabelStore

__all__ = ["MetaCleaner"]


class MetaCleaner(NoisyLabelModule):
    """Cross-entropy of the confidence-weighted mean feature of K images with the same given label.

    After Zhang et al., CVPR 2019. There is no released code; this is a reading of the paper's description, and no
    reproduction. As described: the confidence scores of K images of one class are estimated from their features jointly
    ("noisy weighting"), and the sum of the features, weighted by the scores, is classified as that class ("clean
    hallucinating"); single images are classified by the same classifier for prediction. This reading:

    - a set is K images, drawn at random from the samples with the same given label; all classes have equally many sets;
    - the features are the input of the network's linear classifier;
    - the score of an image is computed by a perceptron with one hidden layer from its feature and the mean feature of the
      set, both normalized by their root mean square; a softmax over the set, with a temperature, gives the weights;
    - the weights have a gradient, and no further loss.

    Under SANM, images are masked, and the label of a set is the mean of the regularized labels with the weights; label
    quality is K times the weight of the image in its last set, at most 1.

    Args:
        num_classes: C, number of classes.
        set_size: K, images per set, >= 1; 1 is cross-entropy on balanced classes. At most the batch size is used.
        hidden: width of the hidden layer, >= 1.
        temperature: temperature of the weights, > 0; large values give equal weights.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, or the network does not end in a linear layer.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self, num_classes: int, set_size: int = 5, hidden: int = 128, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        check_range(">= 1", set_size=set_size, hidden=hidden)
        check_range("> 0", temperature=temperature)
        super().__init__(num_classes, **kwargs)
        classifier = self.network.get_classifier()
        if not isinstance(classifier, nn.Linear):
            raise ValueError(
                f"expected a network with a linear classifier for MetaCleaner, got {type(classifier).__name__}; use another "
                "network, such as resnet50"
            )
        self.set_size, self.temperature = set_size, temperature
        width = pooled_width(self.network)
        self.scorer = nn.Sequential(nn.Linear(2 * width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.judged = LabelStore()

    def images_per_set(self, size: int) -> int:
        """Return K for batches of ``size`` samples."""
        return min(self.set_size, size)

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Report a batch that is smaller than a set."""
        size = min(batch_size, -(-num_samples // world_size))
        if self.images_per_set(size) < self.set_size:
            rank_zero_info(
                f"MetaCleaner: sets of {size} instead of {self.set_size} images, the number of samples per step"
            )

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Select sets of samples with the same given label."""
        pool, labels = plan.pool(0), self.given_labels.cpu()
        size = plan.step_size(pool)
        each = self.images_per_set(size)
        sets = plan.steps * (size // each)
        members = members_by_class(pool, labels[pool], self.num_classes)
        drawn = class_sets(*members, plan.world_size * sets, each, self.epoch_stream(plan, "draw"))
        return drawn[plan.rank :: plan.world_size].reshape(plan.steps, -1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        each = self.images_per_set(len(batch.labels))
        out = self.learn(batch, self.one_hot(batch.labels), quality=self.judged.given_quality[index])
        features = self.network.forward_head(out.features, pre_logits=True)
        sets = features.float().view(-1, each, features.shape[1])  # (S, K, D)
        weights = self.weigh(sets)
        clean = self.network.get_classifier()((weights[..., None] * sets).sum(1).to(features.dtype))
        held = weights.detach()
        targets = (held[..., None] * out.targets.view(-1, each, self.num_classes)).sum(1)
        quality = (each * held.flatten()[-len(index) :]).clamp(max=1)
        self.judged.write("given_quality", index, quality)
        return soft_cross_entropy(clean, targets).mean() + out.reconstruction

    def weigh(self, sets: Tensor) -> Tensor:
        """Return the weights of the images of each set, features (S, K, D) -> (S, K), rows sum to 1."""
        context = sets.mean(1, keepdim=True).expand_as(sets)
        parts = (part / (part.square().mean(2, keepdim=True) + 1e-8).sqrt() for part in (sets, context))
        dtype = next(self.scorer.parameters()).dtype
        scores: Tensor = self.scorer(torch.cat(tuple(parts), 2).to(dtype))[..., 0]
        return (scores.float() / self.temperature).softmax(1)
