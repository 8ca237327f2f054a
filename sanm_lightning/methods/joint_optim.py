"""Joint-Optim (Tanaka et al., CVPR 2018): joint optimization of the network and of the labels."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import entropy, prior_kl, step_thirds
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, require
from sanm_lightning.per_sample import History, LabelStore

__all__ = ["JointOptim"]


class JointOptim(NoisyLabelModule):
    """Train with a high learning rate, replace the labels by mean predictions, and train a new network on the result.

    Source: Tanaka et al., CVPR 2018, Algorithm 1, Eq. 4 to 9, and the authors' code. Predictions are those of the training
    steps of the last ten epochs. In the first two stages, the loss has the divergence of the mean prediction from the class
    prior and the entropy of the predictions; in the third one, the network is new and the loss is the cross-entropy.

    Departures: the mean is over the epochs so far, where the code divides by ten also before the tenth epoch. The learned
    labels are used as probabilities throughout, as in the code for soft labels. The divergence is the paper's Eq. 6; the
    code's cross-entropy differs from it by a constant.

    Under SANM, masks are used in all stages; label quality is the learned probability of the given label.

    Args:
        num_classes: C, number of classes.
        alpha: weight of the divergence from the class prior, >= 0; published for CIFAR-10: 1.2 at 70 % symmetric noise, 0.8 at
            40 % asymmetric noise.
        beta: weight of the entropy, >= 0; published likewise: 0.8 and 0.4.
        update_epochs: length of the second stage, in which labels are replaced in every epoch; None uses 130 of 250 epochs
            after the first stage, as published; set it if ``max_epochs`` may be raised in a resumed run.
        window: epochs whose predictions are averaged.
        prior: class probabilities, C values; None is the uniform prior.
        retrain_lr: initial learning rate of the third stage, divided by 10 after one third and two thirds of it.
        warmup_epochs: length of the first stage, with the given labels.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        alpha: float = 1.2,
        beta: float = 0.8,
        update_epochs: int | None = None,
        window: int = 10,
        prior: list[float] | None = None,
        retrain_lr: float = 0.2,
        warmup_epochs: int = 70,
        **kwargs: Any,
    ) -> None:
        check_range(">= 0", alpha=alpha, beta=beta)
        check_range(">= 0 or null", update_epochs=update_epochs)
        check_range("> 0", retrain_lr=retrain_lr)
        good = prior is None or (len(prior) == num_classes and min(prior) > 0 and abs(sum(prior) - 1) <= 1e-3)
        expected = f"a prior of {num_classes} positive probabilities with sum 1"
        require(good, expected, prior, "normalize the class counts")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.alpha, self.beta, self.update_epochs, self.retrain_lr = alpha, beta, update_epochs, retrain_lr
        self.prior = None if prior is None else torch.tensor(prior)
        self.predicted = History(window, (num_classes,))
        self.learned = LabelStore(num_classes, dist_reduce_fx=None)

    def stages(self) -> list[Stage]:
        """Return the stages with given labels, with labels that are replaced, and with a new network."""
        update_epochs = self.fraction_of_run(130, 250) if self.update_epochs is None else self.update_epochs
        retrain = Stage("retrain", reset="network", lr=self.retrain_lr, factor=step_thirds)
        return [Stage("warmup", self.warmup_epochs), Stage("update", update_epochs), retrain]

    def begin_epoch(self) -> None:
        """Replace the labels by the mean predictions of the last epochs."""
        if self.stage.name == "warmup" or (self.stage.name == "retrain" and self.stage_epoch > 0):
            return
        seen = self.predicted.count[:, None] > 0
        targets = torch.where(seen, self.predicted.mean(), self.learned.targets)
        given = self.given_labels
        self.learned.update(targets=targets, given_quality=targets.gather(1, given[:, None])[:, 0].clamp(0, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        quality = self.learned.given_quality[index] if self.learned.filled else None
        out = self.learn(batch, self.learned.targets[index], quality=quality)
        if self.stage.name == "retrain":
            return out.cross_entropy()
        self.predicted.append(index, out.unmasked_logits().float().softmax(1))
        prior = None if self.prior is None else self.prior.to(out.logits.device)
        return out.cross_entropy() + self.alpha * prior_kl(out.logits, prior) + self.beta * entropy(out.logits).mean()
