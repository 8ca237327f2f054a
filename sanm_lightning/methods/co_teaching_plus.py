"""Co-teaching+ (Yu et al., ICML 2019): Co-teaching on the samples for which the two networks disagree."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import forget_rate as forget_rate_at
from sanm_lightning.functional import masked_mean, small_loss_among, soft_cross_entropy
from sanm_lightning.methods.checks import require_index
from sanm_lightning.methods.co_teaching import CoTeaching

__all__ = ["CoTeachingPlus"]


class CoTeachingPlus(CoTeaching):
    """Each network is trained on the small-loss samples of the other one, among those that they classify differently.

    Source: Yu et al., ICML 2019, Algorithm 1, and the authors' code. The first stage is Co-teaching. If the networks agree on
    a whole batch, both are trained on all of its samples.

    Departures: losses are computed from logits and averaged once; the options ``released_*`` restore the code.

    Under SANM, as for :class:`CoTeaching`: disagreement and small losses are those of unmasked images, and each network is
    masked according to the other network's estimate of label quality, which is the loss mixture also for samples that both
    networks select.

    Args:
        num_classes: C, number of classes.
        released_double_softmax: whether the loss applies the softmax to probabilities, as in the code; it is then between
            log(C) - 1 and log(C - 1 + e), with small gradients.
        released_lost_sample: whether the last disagreeing sample of a batch is lost if sample 0 of the training set is among
            them, as in the code.
        warmup_epochs: length of the first stage; published: 20 on CIFAR-10, 5 on CIFAR-100.

    All other arguments are those of :class:`CoTeaching`, with ``released_scale``.

    Raises:
        ValueError: if an argument is out of its range, ``noise_rate`` is missing, or, with ``released_lost_sample``, batches
            have no index.
    """

    def __init__(
        self,
        num_classes: int,
        released_double_softmax: bool = False,
        released_lost_sample: bool = False,
        warmup_epochs: int = 20,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.released_double_softmax, self.released_lost_sample = released_double_softmax, released_lost_sample

    def stages(self) -> list[Stage]:
        """Return the stage of Co-teaching and that of disagreement."""
        return [Stage("warmup", self.warmup_epochs), Stage("disagreement")]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses on the samples selected by the other network."""
        if self.stage.name == "warmup":
            return super().training_step(batch, batch_idx)
        batch = NoisyBatch.from_any(batch)
        targets = self.one_hot(batch.labels)
        kept = 1 - forget_rate_at(self.current_epoch, self.noise_rate, self.num_gradual, self.exponent)
        seen = [self.learn(batch, targets, number) for number in (0, 1)]
        clean = [out.unmasked_logits() for out in seen]
        differing = clean[0].argmax(1) != clean[1].argmax(1)
        if self.released_lost_sample:
            differing = _without_last(differing, require_index(batch, type(self).__name__))
        agreed = ~differing.any()
        chosen = [small_loss_among(self._losses(logits, targets), kept, differing) | agreed for logits in clean]
        total = torch.zeros((), device=targets.device)
        for out, choice in zip(seen, reversed(chosen), strict=True):
            loss = masked_mean(self._losses(out.logits, out.targets), out.per_view(choice))
            total = total + (loss / choice.sum() if self.released_scale else loss) + out.reconstruction
        return total

    def _losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return soft_cross_entropy(logits.float().softmax(1) if self.released_double_softmax else logits, targets)


def _without_last(differing: Tensor, index: Tensor) -> Tensor:
    """Remove the last of the differing samples (B,) if sample 0 of the training set is among them."""
    position = torch.arange(len(index), device=index.device)
    last = torch.where(differing, position, -1).amax()
    return differing & ~((differing & (index == 0)).any() & (position == last))
