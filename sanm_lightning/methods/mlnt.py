"""MLNT (Li et al., CVPR 2019): a network whose predictions withstand a gradient step on perturbed labels."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.callbacks import Stage
from sanm_lightning.functional import (
    forward_kl,
    gradients,
    lookahead,
    neighbor_labels,
    network_at,
    sigmoid_ramp,
    trainable,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, refuse_compiled
from sanm_lightning.methods.ema import EMA, stepped_decay
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.inference import inference_context

__all__ = ["MLNT"]


class MLNT(NoisyLabelModule):
    """Cross-entropy, and agreement with an averaged teacher after look-ahead steps on perturbed labels.

    Source: Li et al., CVPR 2019, Eq. 1 to 7 and Algorithm 1, and the authors' code. In each step, M copies of the labels of
    the batch are perturbed: half of the samples take the label of a near neighbor in the batch, by the features of a
    pre-trained mentor. For each copy, the network after one gradient step on it is compared with the teacher by
    KL(teacher || network), averaged over copies and samples.

    Departures: the mentor is the network at the end of the first stage, trained by cross-entropy, where the code loads one
    from a separate training. There is one round, as in the code, where the paper repeats the training two or three times on
    samples that the last teacher selects. The label of a sample never comes from the sample itself, which the code excludes
    only if it is its own first neighbor. Predictions are those of the network, where the code takes network or teacher by
    the accuracy on clean validation data.

    Under SANM, the cross-entropy uses masked images, and the look-ahead unmasked ones, with one more forward pass. Label
    quality is the teacher's probability of the given label.

    Args:
        num_classes: C, number of classes.
        num_lookaheads: M, number of perturbed copies; published: 10. 0 is cross-entropy.
        meta_lr: learning rate of the look-ahead steps, >= 0; published: 0.02 on Clothing1M, 0.2 on CIFAR-10.
        meta_weight: weight of the agreement with the teacher, >= 0; published: 1 on Clothing1M. For CIFAR-10, the
            paper has a separate step with learning rate 0.4; the code, for Clothing1M, has one step with the sum of the losses.
        perturbed_fraction: fraction of the labels that are perturbed, in [0, 1]; published: 0.5.
        neighbors: number of neighbors, one of which gives its label; published: 10. A batch of B samples has at most B - 1.
        ramp_steps: steps after the first stage over which the weight increases; the teacher averages with 0.99 in them and
            with 0.999 afterwards. Published: 1500 on Clothing1M, 20 epochs on CIFAR-10.
        second_order: whether to differentiate the look-ahead gradients too. The code does, against the paper, which uses the
            first-order approximation; that is the default, as it saves a quarter of the time and a large part of the memory.
        released_kl: whether to divide the KL divergence by C, as in the code.
        warmup_epochs: length of the first stage, of cross-entropy.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or ``compile_network`` is set.
    """

    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        num_lookaheads: int = 10,
        meta_lr: float = 0.02,
        meta_weight: float = 1.0,
        perturbed_fraction: float = 0.5,
        neighbors: int = 10,
        ramp_steps: int = 1500,
        second_order: bool = False,
        released_kl: bool = False,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        check_range(
            ">= 0", num_lookaheads=num_lookaheads, meta_lr=meta_lr, meta_weight=meta_weight, ramp_steps=ramp_steps
        )
        check_range("in [0, 1]", perturbed_fraction=perturbed_fraction)
        check_range(">= 1", neighbors=neighbors)
        refuse_compiled("MLNT", kwargs.get("compile_network"))
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.num_lookaheads, self.meta_lr, self.meta_weight = num_lookaheads, meta_lr, meta_weight
        self.perturbed_fraction, self.neighbors, self.ramp_steps = perturbed_fraction, neighbors, ramp_steps
        self.second_order, self.released_kl = second_order, released_kl
        self.mentor = copy.deepcopy(self.network).requires_grad_(False)
        self.teacher = EMA(self.network, partial(stepped_decay, ramp_steps))
        self.judged = LabelStore()
        self.judged.required = False

    def stages(self) -> list[Stage]:
        """Return the stages without and with look-ahead."""
        return [Stage("warmup", self.warmup_epochs), Stage("meta")]

    def begin_stage(self) -> None:
        """Copy the network to mentor and teacher."""
        for copied in (self.mentor, self.teacher.module):
            copied.load_state_dict(self.network.state_dict())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch.from_any(batch)
        labels = self.one_hot(batch.labels)
        if self.stage.name == "warmup":
            return self.learn(batch, labels).cross_entropy()
        teacher = self.teacher(batch.images).float().softmax(1)
        quality = (teacher * labels).sum(1)
        if batch.index is not None and len(self.judged):
            self.judged.write("given_quality", batch.index, quality)
        out = self.learn(batch, labels, quality=quality)
        if self.num_lookaheads == 0:
            return out.cross_entropy()
        logits = out.logits
        if self.sanm.masking(self.current_epoch, self.warmup_epochs):
            logits = network_at(self.network, trainable(self.network), batch.images)
        weight = self.meta_weight * sigmoid_ramp(self.teacher.steps, self.ramp_steps)
        return out.cross_entropy() + weight * self.disagreement(batch.images, labels.argmax(1), logits, teacher)

    def disagreement(self, images: Tensor, labels: Tensor, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean KL divergence of the teacher (B, C) from the network after look-ahead steps, a scalar."""
        parameters, generator = trainable(self.network), self.stream("perturb")
        with inference_context(self.mentor, images):
            features = self.mentor.forward_head(self.mentor.forward_features(images), pre_logits=True)
        copies = neighbor_labels(
            labels, features, self.num_lookaheads, self.perturbed_fraction, self.neighbors, generator
        )
        divergences = []
        for perturbed in copies:
            steps = gradients(F.cross_entropy(logits.float(), perturbed), parameters, self.second_order)
            ahead = network_at(self.network, lookahead(parameters, steps, self.meta_lr), images)
            divergences.append(forward_kl(ahead, teacher).mean())
        return torch.stack(divergences).mean() / (self.num_classes if self.released_kl else 1)

    def after_optimizer_step(self) -> None:
        """Update the teacher, a copy of the network in the first stage."""
        if self.stage.name == "warmup":
            self.teacher.restart()
        self.teacher.update(self.network)
