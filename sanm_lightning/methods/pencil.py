"""PENCIL (Yi and Wu, CVPR 2019): label distributions that are learned together with the network."""

from functools import partial
from typing import Any

from torch import Tensor

from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import entropy, label_step, reverse_kl, step_thirds
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.per_sample import LabelStore, LearnableTargets

__all__ = ["PENCIL"]


class PENCIL(NoisyLabelModule):
    """Cross-entropy, then a divergence from label distributions that are learned by gradient descent, then from fixed ones.

    Source: Yi and Wu, CVPR 2019, Eq. 1 to 9 and Algorithm 1, and the authors' code. Each sample has logits of a label
    distribution d. In the second stage, the loss is KL(p || d) / C + alpha times the cross-entropy of d and the given label
    + beta / C times the entropy of p; in the third stage, d is fixed and the loss is KL(p || d) / C. The divisions by C are
    those of the code, which averages over classes.

    Under SANM, the divergence is that of the masked view from the regularized distribution; the step on d uses the prediction
    for the unmasked image. Label quality is the overlap of d and p, their scalar product, at the last visit: d alone is above
    0.999 for every given label when the second stage begins. In lists, it is the probability of the given label in d.

    Args:
        num_classes: C, number of classes.
        alpha: weight of the compatibility with the given label, >= 0. 0.1 in the paper, 0.4 by default in the code.
        beta: weight of the entropy, >= 0. 0.4 in the paper, 0.1 by default in the code.
        label_lr: learning rate of the label distributions for the loss of one sample, which does not depend on the batch size,
            >= 0; the default is the published lambda of 600 divided by the batch size of 128.
        label_scale: K, initial logit of the given label; published: 10.
        label_epochs: length of the second stage; None uses 130 of 250 epochs after the first stage, as published; set it if
            ``max_epochs`` may be raised in a resumed run.
        finetune_lr: initial learning rate of the third stage, divided by 10 after one third and two thirds of it.
        released_compatibility: whether the compatibility applies a softmax to d once more, as in the code.
        released_rates: whether the learning rate of the third stage is 0 after one third of it, which is the result of an
            integer division in the code.
        warmup_epochs: length of the first stage; published: 70.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        alpha: float = 0.1,
        beta: float = 0.4,
        label_lr: float = 600 / 128,
        label_scale: float = 10.0,
        label_epochs: int | None = None,
        finetune_lr: float = 0.2,
        released_compatibility: bool = False,
        released_rates: bool = False,
        warmup_epochs: int = 70,
        **kwargs: Any,
    ) -> None:
        check_range(">= 0", alpha=alpha, beta=beta, label_lr=label_lr)
        check_range(">= 0 or null", label_epochs=label_epochs)
        check_range("> 0", label_scale=label_scale, finetune_lr=finetune_lr)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.alpha, self.beta, self.label_lr, self.label_epochs = alpha, beta, label_lr, label_epochs
        self.finetune_lr, self.released_rates = finetune_lr, released_rates
        self.released_compatibility = released_compatibility
        self.labels = LearnableTargets(num_classes, label_scale)
        self.agreement = LabelStore()

    def stages(self) -> list[Stage]:
        """Return the stages with given labels, with learned and with fixed label distributions."""
        factor = partial(step_thirds, factor=0.0 if self.released_rates else 0.1)
        label_epochs = self.fraction_of_run(130, 250) if self.label_epochs is None else self.label_epochs
        finetune = Stage("finetune", lr=self.finetune_lr, factor=factor)
        return [Stage("warmup", self.warmup_epochs), Stage("labels", label_epochs), finetune]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch; in the second stage, take a gradient step on its label distributions."""
        batch, index = self.indexed(batch)
        given = self.one_hot(batch.labels)
        if self.stage.name == "warmup":
            out = self.learn(batch, given)
            loss = out.classification()
        else:
            learned = self.labels(index)
            out = self.learn(batch, learned.detach().softmax(1), quality=self.agreement.quality[index])
            loss = reverse_kl(out.logits, out.targets).mean() / self.num_classes
        logits = out.unmasked_logits()
        if self.stage.name == "labels":
            loss = loss + self.beta * entropy(out.logits).mean() / self.num_classes
            learned.grad = label_step(learned, logits, given, self.alpha, twice=self.released_compatibility)
            self.labels.sgd_step(index, self.label_lr)
        distribution = self.labels.logits[index].softmax(1)
        self.agreement.write("quality", index, (distribution * logits.float().softmax(1)).sum(1))
        self.agreement.write("given_quality", index, (distribution * given).sum(1))
        return loss + out.reconstruction
