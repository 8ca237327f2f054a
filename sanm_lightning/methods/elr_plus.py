"""ELR+ (Liu et al., NeurIPS 2020): ELR with two networks, mixup, and averaged teachers that write the targets."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.elr import (
    clamped_probabilities,
    early_learning_regularization,
    fit_to_training_set,
    indices_of,
)
from sanm_lightning.methods.mixup import mixup
from sanm_lightning.methods.two_networks import TwoNetworks, draw_anew
from sanm_lightning.per_sample_old import TargetBank
from sanm_lightning.sanm.module import SANM, without_trace
from sanm_lightning.sanm.quality import label_loss

__all__ = ["ELRPlus", "averaging_share", "sigmoid_ramp"]


def sigmoid_ramp(step: int, length: int) -> float:
    """Rise from exp(-5) to 1 over ``length`` steps: exp(-5 (1 - step / length)^2); 1 where the length is 0."""
    return 1.0 if length == 0 else math.exp(-5 * (1 - min(step, length) / length) ** 2)


def averaging_share(step: int, gamma: float, ramp_steps: int | None) -> float:
    """Return the share of a teacher's old weights that stays at step ``step``, counted from 0.

    With ``ramp_steps`` S, gamma exp(-5 (1 - min(step + 1, S) / S)^2); without, min(1 - 1 / (step + 1), gamma).
    """
    if ramp_steps is not None:
        return gamma * sigmoid_ramp(step + 1, ramp_steps)
    return min(1 - 1 / (step + 1), gamma)


class ELRPlus(TwoNetworks):
    """Two networks learn from mixed images; the other's averaged teacher writes what each is to remember.

    Source: Liu et al., NeurIPS 2020, Appendix C, and the authors' code. As there, teachers start from weights of their own,
    are averages of parameters (their batch norm follows the batches that they see), and look at unmixed images.

    Departures: both networks learn in every step, where the code trains one for an epoch and then the other. They share one
    data set, where the code gives each its own split and its own noise.

    Predictions: the mean of both networks' logits; the teachers do not vote.

    Under SANM masked views and regularised targets are made before mixup; teachers see unmasked images. The reconstruction has
    a forward of its own on the masked, unmixed views. In SANM's warm-up label quality costs a pass over unmixed images.

    Args:
        num_classes: C.
        momentum: of the remembered targets, in [0, 1).
        weight: of the regularisation, >= 0.
        coef_steps: steps over which the weight rises; 0 has it at once (published: 40,000 on CIFAR-100).
        alpha: of mixup's Beta distribution, >= 0.
        gamma: share of a teacher's weights that stays at a step, in [0, 1).
        ema_ramp_steps: steps over which that share rises from near 0; None takes the published form without ramp.
        target_product: multiply mixed labels by remembered targets; None is as published: on 100 classes.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` says when SANM starts.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

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
        for name, value, good in (
            ("weight >= 0", weight, weight >= 0),
            ("coef_steps >= 0", coef_steps, coef_steps >= 0),
            ("alpha >= 0", alpha, alpha >= 0),
            ("gamma in [0, 1)", gamma, 0 <= gamma < 1),
            ("ema_ramp_steps > 0 or null", ema_ramp_steps, ema_ramp_steps is None or ema_ramp_steps > 0),
        ):
            if not good:
                raise ValueError(f"expected {name}, got {value!r}")
        super().__init__(num_classes, **kwargs)
        self.weight, self.coef_steps, self.alpha = weight, coef_steps, alpha
        self.gamma, self.ema_ramp_steps = gamma, ema_ramp_steps
        self.target_product = num_classes == 100 if target_product is None else target_product
        self.teachers = nn.ModuleList(copy.deepcopy(network).apply(draw_anew) for network, _, _ in self.pairs)
        self.teachers.requires_grad_(False)
        self.banks = nn.ModuleList(TargetBank(0, num_classes, momentum) for _ in self.pairs)
        self._averaged = 0  # optimizer steps that the teachers have seen

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses."""
        batch = NoisyBatch(*batch)
        index, targets = indices_of(batch, "ELRPlus"), self.one_hot(batch.labels)
        generator = self.random_stream(batch_idx)
        ramp = sigmoid_ramp(self.global_step, self.coef_steps)
        total = torch.zeros((), device=targets.device)
        for number, (network, sanm, peer) in enumerate(self.pairs):
            with torch.no_grad():
                written = self.teachers[1 - number](batch.images).float().softmax(1)
            remembered = self.banks[number].update(index, written)  # type: ignore[operator]
            views = sanm(network, batch.images, targets, self.peer_quality(batch, targets, peer))
            self._observe(network, sanm, batch, views.logits, targets)
            mixed = mixup(views.images, views.targets, generator, self.alpha)
            goal = mixed.mix(remembered.repeat(len(views.images) // len(remembered), 1))
            wanted = mixed.targets
            if self.target_product:
                wanted = wanted * goal
                wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-12)
            features = network.forward_features(mixed.images)
            logits = network.forward_head(features)
            term = early_learning_regularization(clamped_probabilities(logits), goal)
            if views.box is not None and sanm.reconstruct:  # what was mixed cannot be painted
                features = network.forward_features(views.images)
            loss = label_loss(logits, wanted).mean() + ramp * self.weight * term
            total = total + loss + sanm.reconstruction(features, batch.images)
        return total

    def _observe(self, network: Any, sanm: SANM, batch: NoisyBatch, logits: Tensor | None, targets: Tensor) -> None:
        """Note what a network says of unmixed, unmasked images; in SANM's warm-up nobody has asked it yet."""
        if not sanm.enabled:
            return
        if logits is None:
            with without_trace(network, batch.images, sanm.batch_statistics):
                logits = network(batch.images)
        sanm.label_quality.observe(logits, targets, batch.index)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the teachers follow: here, so that whatever is saved after the step has both."""
        super().optimizer_step(*args, **kwargs)
        share = averaging_share(self._averaged, self.gamma, self.ema_ramp_steps)
        with torch.no_grad():
            for teacher, (network, _, _) in zip(self.teachers, self.pairs, strict=True):
                for slow, fast in zip(teacher.parameters(), network.parameters(), strict=True):
                    slow.lerp_(fast.to(slow.dtype), 1 - share)
        self._averaged += 1

    def setup(self, stage: str) -> None:
        """Make room for the training samples."""
        super().setup(stage)
        for bank in self.banks:
            fit_to_training_set(self, bank, stage)  # type: ignore[arg-type]

    def on_train_epoch_end(self) -> None:
        """Share what the processes remember."""
        super().on_train_epoch_end()
        for bank in self.banks:
            bank.merge()  # type: ignore[operator]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what all processes remember, and the steps that the teachers have seen."""
        super().on_save_checkpoint(checkpoint)
        for number, bank in enumerate(self.banks):
            checkpoint["state_dict"][f"banks.{number}._extra_state"] = bank.complete_state()  # type: ignore[operator]
        checkpoint["method"]["averaged"] = self._averaged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what :meth:`on_save_checkpoint` added."""
        super().on_load_checkpoint(checkpoint)
        self._averaged = checkpoint.get("method", {}).get("averaged", 0)
