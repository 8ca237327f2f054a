"""Base class of methods that train a projection, select samples, and then fine-tune on them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import bootstrapped, mixup, zero_term
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.batches import selected_batches
from sanm_lightning.methods.checks import check_range
from sanm_lightning.models import Projection
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import infer

__all__ = ["FineTuned"]


class FineTuned(NoisyLabelModule):
    """Base class of MOIT+ and Sel-CL+, with their last stage: cross-entropy of mixed views of the selected samples.

    A subclass writes the selection and the quality of the labels into the table ``detected``.

    Args:
        num_classes: C, number of classes.
        projection: P, width of the embeddings.
        alpha: parameter of mixup's Beta distribution, >= 0.
        select_epochs: length of the second stage, followed by the fine-tuning; None has no fine-tuning.
        finetune_lr: learning rate of the fine-tuning; published: 0.001. None uses the optimizer's with its schedule.
        bootstrap_after: epochs of the fine-tuning without bootstrapping.
        bootstrap: weight of the predicted class in the bootstrapping, in [0, 1].

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        projection: int = 128,
        alpha: float = 1.0,
        select_epochs: int | None = None,
        finetune_lr: float | None = None,
        bootstrap_after: int = 30,
        bootstrap: float = 0.2,
        **kwargs: Any,
    ) -> None:
        check_range(">= 1", projection=projection)
        check_range(">= 0", alpha=alpha, bootstrap_after=bootstrap_after)
        check_range(">= 1 or null", select_epochs=select_epochs)
        check_range("> 0 or null", finetune_lr=finetune_lr)
        check_range("in [0, 1]", bootstrap=bootstrap)
        super().__init__(num_classes, **kwargs)
        self.alpha, self.select_epochs, self.finetune_lr = alpha, select_epochs, finetune_lr
        self.bootstrap_after, self.bootstrap = bootstrap_after, bootstrap
        self.projection = Projection(self.network, projection)
        self.detected = LabelStore(dist_reduce_fx=None)

    def stages(self) -> list[Stage]:
        """Return the stages without and with selected samples, and the fine-tuning, if there is one."""
        found = [Stage("warmup", self.warmup_epochs), Stage("select", self.select_epochs)]
        if self.select_epochs is not None:
            found.append(Stage("finetune", reset="head", lr=self.finetune_lr, frozen=("projection",)))
        return found

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Sample selected samples in the fine-tuning."""
        return self.selected_batches(plan) if self.stage.name == "finetune" else None

    def selected_batches(self, plan: EpochPlan) -> Tensor:
        """Return positions (S, B) of selected samples in random rounds."""
        return selected_batches(plan, self.detected.selected, self.epoch_stream(plan, "draw"))

    def mix(self, number: int) -> Any:
        """Return the function that mixes a view, with its own random weight, at least 1/2."""
        return partial(mixup, generator=self.stream("mixup", number), alpha=self.alpha)

    @property
    def bootstraps(self) -> bool:
        """Whether the predicted class is learned in this epoch of the fine-tuning."""
        return self.stage_epoch >= self.bootstrap_after

    def finetune(self, batch: NoisyBatch) -> Tensor:
        """Return the cross-entropy of mixed weak views, with targets between the given label and the predicted class."""
        targets = self.one_hot(batch.labels)
        if self.bootstraps:
            _, logits = infer(self.network, batch.views[1])
            targets = bootstrapped(targets, logits, torch.full_like(targets[:, 0], 1 - self.bootstrap))
        out = self.learn(batch, targets, quality=self.detected.quality[batch.index], mix=self.mix(1))
        return out.cross_entropy() + zero_term(self.projection.parameters())
