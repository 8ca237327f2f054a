"""F-correction (Patrini et al., CVPR 2017): loss correction with an estimated noise transition matrix."""

from typing import Any, Literal

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    backward_correction,
    check_transition,
    estimate_transition,
    forward_correction,
    label_posterior,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_choice, require
from sanm_lightning.per_sample import LabelStore

__all__ = ["ForwardCorrection", "check_transition"]


class ForwardCorrection(NoisyLabelModule):
    """Estimate the transition matrix of the labels with a first network, and train a second one on the corrected loss.

    Source: Patrini et al., CVPR 2017, Algorithm 1, and the authors' code. The first stage is trained with cross-entropy. At
    its end, the matrix is estimated from the predictions for the training set; then the network is reinitialized.

    Departures: the first network is that of the last epoch of the stage, where the code keeps the one of the lowest loss on
    held-out noisy labels. The learning rate starts again only with a schedule that does so, such as ``Sequential``.

    Under SANM, the loss of the masked view is corrected. Label quality is the posterior probability of the given label under
    the matrix, from the last unmasked prediction for the sample.

    Args:
        num_classes: C, number of classes.
        transition: known matrix, C rows of C probabilities, which omits the first stage; None estimates it.
        direction: ``"forward"`` or ``"backward"`` correction. The loss of the latter can be negative.
        percentile: percentile of the predictions above which samples are not used for the estimate; published: 97 on CIFAR-10,
            None on CIFAR-100.
        reset: whether to reinitialize the network after the estimate, as published.
        warmup_epochs: length of the first stage; 0 estimates the matrix from the initial network, such as one loaded with
            ``--weights``. With ``transition``, it affects SANM only.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    estimates_quality = True
    transition: Tensor
    """(C, C): the identity matrix before the estimate."""

    def __init__(
        self,
        num_classes: int,
        transition: list[list[float]] | None = None,
        direction: Literal["forward", "backward"] = "forward",
        percentile: float | None = 97.0,
        reset: bool = True,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        check_choice(("forward", "backward"), direction=direction)
        good = percentile is None or 0 < percentile <= 100
        require(good, "percentile in (0, 100] or null", percentile, "use 97 or null")
        known = None if transition is None else check_transition(transition, num_classes)
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.direction, self.percentile, self.renew, self.known = direction, percentile, reset, transition is not None
        self.needs_data_module = not self.known
        self.register_state("transition", torch.eye(num_classes) if known is None else known, cast=False)
        self.posterior = LabelStore()
        self.posterior.required = self.sanm.enabled

    def stages(self) -> list[Stage]:
        """Return the stage of the estimate, unless the matrix is known, and that of the corrected loss."""
        if self.known:
            return [Stage("corrected")]
        return [Stage("warmup", self.warmup_epochs), Stage("corrected", reset="network" if self.renew else "none")]

    def begin_stage(self) -> None:
        """Estimate the matrix from the predictions of the first network."""
        self.transition = estimate_transition(self.predict_train("logits")["logits"].softmax(1), self.percentile)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        labels = self.one_hot(batch.labels)
        tracked = batch.index is not None and len(self.posterior) > 0
        if self.stage.name == "warmup":
            return self.learn(batch, labels).cross_entropy()
        out = self.learn(batch, labels, quality=self.posterior.given_quality[batch.index] if tracked else None)
        if tracked:
            posterior = label_posterior(out.unmasked_logits(), labels, self.transition)
            self.posterior.write("given_quality", batch.index, posterior)
        corrected = forward_correction if self.direction == "forward" else backward_correction
        return corrected(out.logits, out.targets, self.transition).mean() + out.reconstruction
