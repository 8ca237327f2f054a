"""IEG (Zhang et al., CVPR 2020): weights and labels of the samples from a look-ahead step, judged on a few known labels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.batch import NoisyBatch, View
from sanm_lightning.functional import (
    forward_kl,
    guessed_labels,
    meta_gradients,
    meta_weights,
    reweighted_cross_entropy,
    rms_normalize,
    row_mixup,
    sgd_step,
    soft_cross_entropy,
)
from sanm_lightning.methods.checks import check_range, refuse_compiled
from sanm_lightning.methods.ema import EMA, ramped_decay
from sanm_lightning.methods.probe_set import WithProbeSet

__all__ = ["IEG"]


class IEG(WithProbeSet):
    """Semi-supervised training with sample weights and label choices that reduce the loss on a few samples of known labels.

    Source: Zhang et al., CVPR 2020 ("Distilling effective supervision from severe label noise"), and the authors' code. The
    method requires known labels of some training samples, the probe set: its results are not comparable with those of
    methods without them. Weights and choices of labels follow the gradient of the probe loss after one look-ahead step.

    Departures: batches of the probe set are random permutations, where those of the code have balanced classes. The
    look-ahead step has the weight decay and the momentum of ``torch.optim.SGD``, as in the code; with other optimizers, it is
    plain gradient descent. The threshold between clean and noisy samples that the paper describes is not in the code, and
    not here. The strong view has no cutout, and a policy for each image, where the code has one for each batch.

    Prediction: the averaged network, with the batch norm statistics of the trained one.

    Under SANM, the views with guessed labels are masked before they are mixed; label quality is B times the weight of the
    sample, at most 1, if the given label is used, and 0 otherwise; of probe samples, whether the given label is the known one.

    Args:
        num_classes: C, number of classes.
        probe: file with the known labels, see :class:`~sanm_lightning.methods.probe_set.WithProbeSet`. Required.
        meta_lr: learning rate of the look-ahead step, > 0; published: 0.1.
        meta_momentum: factor of the optimizer's momentum in the look-ahead step, >= 0; published: 0.9.
        trust: weight of the given label against the guessed one in the look-ahead step, in (0, 1]; published: 0.9.
        guess_weight: weight of the views with guessed labels, >= 0; published: 5.
        consistency_weight: weight of the KL divergence, >= 0; published: 20.
        temperature: temperature of the guessed labels, > 0; published: 0.5.
        mixup_beta: parameter of the mixing weights' distribution, > 0; published: 0.5.
        decay: decay of the averaged network, in [0, 1]; published: 0.999.
        strong_view: policy of the strong view.
        second_order: whether to differentiate the look-ahead step by a second backward pass, as in the code; the gradients
            are the same. Operations without forward-mode derivatives require true.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, ``probe`` is missing or has no training sample, no training sample
            remains beside it, or ``compile_network`` is set.
        FileNotFoundError: if the probe file does not exist.
    """

    def __init__(
        self,
        num_classes: int,
        probe: str | None = None,
        meta_lr: float = 0.1,
        meta_momentum: float = 0.9,
        trust: float = 0.9,
        guess_weight: float = 5.0,
        consistency_weight: float = 20.0,
        temperature: float = 0.5,
        mixup_beta: float = 0.5,
        decay: float = 0.999,
        strong_view: str = "auto_augment",
        second_order: bool = False,
        **kwargs: Any,
    ) -> None:
        check_range("> 0", meta_lr=meta_lr, temperature=temperature, mixup_beta=mixup_beta)
        check_range(">= 0", meta_momentum=meta_momentum)
        check_range(">= 0", guess_weight=guess_weight, consistency_weight=consistency_weight)
        check_range("in (0, 1]", trust=trust)
        check_range("in [0, 1]", decay=decay)
        refuse_compiled("IEG", kwargs.get("compile_network"))
        super().__init__(num_classes, probe, **kwargs)
        self.meta_lr, self.meta_momentum, self.trust = meta_lr, meta_momentum, trust
        self.guess_weight, self.consistency_weight, self.temperature = guess_weight, consistency_weight, temperature
        self.mixup_beta, self.strong_view, self.second_order = mixup_beta, strong_view, second_order
        self.average = EMA(self.network, partial(ramped_decay, decay))
        self.average.restart()  # the first update copies the network

    @property
    def prediction_networks(self) -> list[Any]:
        """The averaged network."""
        return [self.average.module]

    def views(self) -> tuple[View, ...]:
        """Return a weak view, and a strong view of the samples that are not in the probe set."""
        return ("weak", (self.strong_view, "none"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        given, index, probe = self.given_and_probe(batch)
        labels, (weak, strong) = self.one_hot(given.labels), given.views
        logits, strong_logits = self.network(weak).float(), self.network(strong).float()
        guesses = guessed_labels([logits, strong_logits], self.temperature)
        weights, chosen = self.judge(given._replace(images=weak), logits, guesses, probe)
        quality = (chosen * len(labels) * weights).clamp(max=1)
        self.samples.write("given_quality", index, quality)
        loss = reweighted_cross_entropy(logits, labels, guesses, chosen, weights, self.trust)
        consistency = forward_kl(strong_logits, logits.detach().softmax(1)).mean()
        mixed = self.mixed_loss(given, guesses, quality, probe)
        return loss + mixed + self.consistency_weight * consistency

    def judge(self, given: NoisyBatch, logits: Tensor, guesses: Tensor, probe: NoisyBatch) -> tuple[Tensor, Tensor]:
        """Return the weight of each sample, and 1 where its given label is used or 0 where its guess is, each (B,)."""
        by_weight, by_trust = meta_gradients(
            self.network, given.images, logits, self.one_hot(given.labels), guesses, probe.images, probe.labels, self.trust,
            sgd_step(self.network, self.trainer.optimizers, self.meta_lr, self.meta_momentum), self.second_order,
        )  # fmt: skip
        return meta_weights(by_weight), (by_trust < 0).float()

    def mixed_loss(self, given: NoisyBatch, guesses: Tensor, quality: Tensor, probe: NoisyBatch) -> Tensor:
        """Return the cross-entropies of mixed probe samples and of mixed views with guessed labels, weighted."""
        generator, size = self.stream("mixup"), len(guesses)
        drawn = torch.randint(len(probe.labels), (size,), generator=generator).to(guesses.device, non_blocking=True)
        extra = probe.images[drawn], self.one_hot(probe.labels[drawn])
        mix = partial(row_mixup, generator=generator, beta=self.mixup_beta)
        views = given.with_images(torch.cat(given.views))
        out = self.learn(views, guesses.repeat(2, 1), quality=quality.repeat(2), mix=mix, extra=extra)
        logits = torch.cat([rms_normalize(block) for block in out.logits.split(size)])
        losses = soft_cross_entropy(logits, out.targets)
        return losses[:size].mean() + self.guess_weight * losses[size:].mean() + out.reconstruction

    def after_optimizer_step(self) -> None:
        """Update the averaged network, with the batch norm statistics of the network."""
        self.average.update(self.network)
        for average, buffer in zip(self.average.module.buffers(), self.network.buffers(), strict=True):
            average.copy_(buffer)
