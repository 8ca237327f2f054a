"""CDR (Xia et al., ICLR 2021): only critical weights receive gradient updates, the others decay."""

from typing import Any, Literal

import torch
from torch import nn

from sanm_lightning.functional import critical_fraction, critical_threshold
from sanm_lightning.methods.checks import check_choice, check_range, require_noise_rate, require_unscaled
from sanm_lightning.methods.cross_entropy import CrossEntropy

__all__ = ["CDR"]


class CDR(CrossEntropy):
    """Cross-entropy with gradient updates of the critical weights only: those with the largest |weight * gradient|.

    Source: Xia et al., "Robust early-learning", ICLR 2021, and the authors' code. The weights of all convolutions and linear
    layers are ranked together; the gradient of the critical ones is multiplied by their fraction, that of the others
    set to 0. All weights decay, and momentum still updates previously critical weights. Batch norm and biases use their
    full gradient. CDR is active from the first epoch on.

    Where paper and code differ, the defaults follow the code, which produced the published results: the fraction is
    constant (the code overwrites its gradual list), and weight decay is the optimizer's squared norm (the paper:
    absolute values). The published results are those of the best epoch on a noisy validation split:
    ``data.val_fraction: 0.1`` and a ``ModelCheckpoint`` that monitors ``val/acc``. Departure: the code runs a second
    forward pass in training mode in every step, for the accuracy, which updates the running statistics of batch norm again.

    Under SANM, the loss is that of :class:`CrossEntropy` under SANM, and the gradient of the reconstruction is masked
    as well, in the same backward pass. The decoder is not part of the network: its weights are not ranked and use their
    full gradient.

    Args:
        num_classes: C, number of classes.
        noise_rate: fraction of wrong labels, known or estimated, in [0, 1); required, and never read from the data.
        schedule: ``"constant"`` (released code) or ``"gradual"``.
        num_gradual: epochs of the gradual schedule.
        decay: ``"l2"`` uses the optimizer's weight decay; ``"l1"`` adds ``l1_decay`` sign(w) to the gradient of the
            ranked weights (as in the paper) and requires an optimizer without weight decay.
        l1_decay: factor of the L1 decay, >= 0.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` affects SANM only.

    Raises:
        ValueError: if an argument is out of its range, or both decays are configured.
    """

    def __init__(
        self,
        num_classes: int,
        noise_rate: float | None = None,
        schedule: Literal["constant", "gradual"] = "constant",
        num_gradual: int = 20,
        decay: Literal["l2", "l1"] = "l2",
        l1_decay: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        noise_rate = require_noise_rate(noise_rate)
        check_choice(("constant", "gradual"), schedule=schedule)
        check_choice(("l1", "l2"), decay=decay)
        check_range(">= 0", num_gradual=num_gradual, l1_decay=l1_decay)
        super().__init__(num_classes, **kwargs)
        self.noise_rate, self.schedule, self.num_gradual = noise_rate, schedule, num_gradual
        self.decay, self.l1_decay = decay, l1_decay

    def competing(self) -> list[nn.Parameter]:
        """Return the weights that are ranked: those of the network with two dimensions or more."""
        return [weight for weight in self.network.parameters() if weight.ndim >= 2 and weight.requires_grad]

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the gradient of all but the critical weights to 0; gradients are unscaled and not clipped yet.

        A subclass that overrides it calls ``super().on_before_optimizer_step(optimizer)``.
        """
        weights = [weight for weight in self.competing() if weight.grad is not None]
        if self.noise_rate > 0 and weights:
            fraction = critical_fraction(self.current_epoch, self.noise_rate, self.schedule, self.num_gradual)
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            threshold = critical_threshold(list(weights), gradients, fraction)
            for weight, gradient in zip(weights, gradients, strict=True):
                critical = (weight * gradient).abs().float() >= threshold
                gradient.mul_(critical.to(gradient.dtype) * fraction)
        if self.decay == "l1":
            for weight in weights:
                assert weight.grad is not None
                weight.grad.add_(weight.sign(), alpha=self.l1_decay)

    def configure_optimizers(self) -> Any:
        """Create the optimizer and its schedule.

        Raises:
            ValueError: if L1 decay is combined with weight decay of the optimizer, or added to scaled gradients.
        """
        made: Any = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        if self.decay == "l1":
            require_unscaled(optimizer, self.trainer, "the L1 decay is added to them")
        decays = [group.get("weight_decay", 0) for group in optimizer.param_groups]
        if self.decay == "l1" and any(decays):
            raise ValueError(f"expected an optimizer with weight_decay 0 for decay: l1, got {max(decays)}; set it to 0")
        return made
