"""ELR+ (Liu et al., NeurIPS 2020): ELR with two networks, mixup, and targets from averaged teachers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.callbacks.stages import reset_parameters
from sanm_lightning.functional import (
    clamped_probs,
    early_learning_regularization,
    ema_decay,
    mixup,
    sigmoid_ramp,
    soft_cross_entropy,
)
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range
from sanm_lightning.methods.ema import EMA
from sanm_lightning.per_sample import EMATargets

__all__ = ["ELRPlus"]


class ELRPlus(NoisyLabelModule):
    """Two networks trained on mixed images, each with targets from the averaged teacher of the other network.

    Source: Liu et al., NeurIPS 2020, Appendix C, and the authors' code. As there, teachers have separate initial weights,
    average parameters only (their batch norm statistics are those of their inputs), and process unmixed images.

    Departures: both networks are trained in every step, where the code alternates epochs. They share one data set, where
    the code uses a separate split and separate noise for each.

    Predictions: the mean of both networks' logits, without the teachers.

    Under SANM, masked views and regularized targets are computed before mixup; teachers process unmasked images. The
    reconstruction uses a separate forward pass on the masked, unmixed views. In SANM's warm-up, label quality requires
    a pass over unmixed images.

    Args:
        num_classes: C, number of classes.
        momentum: momentum of the targets, in [0, 1).
        weight: weight of the regularization, >= 0.
        coef_steps: steps over which the weight increases; 0 disables the ramp (published: 40,000 on CIFAR-100).
        alpha: parameter of mixup's Beta distribution, >= 0.
        gamma: decay of the teachers, in [0, 1).
        ema_ramp_steps: steps over which the decay increases from near 0; None uses the published form without ramp.
        target_product: whether to multiply mixed labels by the targets; None: on 100 classes only, as published.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    num_networks = 2

    def __init__(
        self,
        num_classes: int,
        momentum: float = 0.7,
        weight: float = 3.0,
        coef_steps: int = 0,
        alpha: float = 1.0,
        gamma: float = 0.997,
        ema_ramp_steps: int | None = 40000,
        target_product: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_range(">= 0", weight=weight, coef_steps=coef_steps, alpha=alpha)
        check_range("in [0, 1)", gamma=gamma)
        check_range("> 0 or null", ema_ramp_steps=ema_ramp_steps)
        super().__init__(num_classes, **kwargs)
        self.weight, self.coef_steps, self.alpha = weight, coef_steps, alpha
        self.target_product = num_classes == 100 if target_product is None else target_product
        decay = partial(ema_decay, decay=gamma, ramp_steps=ema_ramp_steps)
        self.teachers = nn.ModuleList(EMA(network, decay) for network in self.networks).apply(reset_parameters)
        self.banks = nn.ModuleList(EMATargets(num_classes, momentum) for _ in self.networks)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses."""
        batch, index = self.indexed(batch)
        labels = self.one_hot(batch.labels)
        mix = partial(mixup, generator=self.stream("mixup"), alpha=self.alpha)
        ramp = sigmoid_ramp(self.global_step, self.coef_steps)
        total = torch.zeros((), device=labels.device)
        pairs: Any = zip(self.banks, reversed(self.teachers), strict=True)
        for number, (bank, teacher) in enumerate(pairs):
            targets = bank.update(index, teacher(batch.images).float().softmax(1))
            out = self.learn(batch, labels, number, mix=mix)
            mixed_targets, mixed_labels = out.mixed.mix(out.per_view(targets)), out.targets
            if self.target_product:
                product = mixed_labels * mixed_targets
                mixed_labels = product / product.sum(1, keepdim=True).clamp(min=1e-12)
            term = early_learning_regularization(clamped_probs(out.logits), mixed_targets)
            loss = soft_cross_entropy(out.logits, mixed_labels).mean() + ramp * self.weight * term
            total = total + loss + out.reconstruction
        return total

    def after_optimizer_step(self) -> None:
        """Update the teachers."""
        pairs: Any = zip(self.teachers, self.networks, strict=True)
        for teacher, network in pairs:
            teacher.update(network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rename the teachers in checkpoints of earlier versions."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("state_dict", {})
        if "teachers.0._extra_state" in state:
            return
        for key in [key for key in state if key.startswith("teachers.")]:
            _, number, name = key.split(".", 2)
            state[f"teachers.{number}.module.{name}"] = state.pop(key)
        steps = checkpoint.get("method", {}).get("averaged", 0)
        for number in range(len(self.teachers)):
            state[f"teachers.{number}._extra_state"] = {"steps": steps, "copy_next": False}
