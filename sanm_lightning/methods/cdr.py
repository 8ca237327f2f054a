"""CDR (Xia et al., ICLR 2021): only the critical weights follow the gradient, the others decay."""

from typing import Any, Literal

import torch
from torch import nn

from sanm_lightning.functional import critical_fraction, critical_threshold
from sanm_lightning.methods.cross_entropy import CrossEntropy

__all__ = ["CDR"]


class CDR(CrossEntropy):
    """Cross-entropy whose gradient moves the critical weights only: those with the largest |weight * gradient|.

    Source: Xia et al., "Robust early-learning", ICLR 2021, and the authors' code. Weights of convolutions and linear layers
    take part, over the whole network together; the gradient of the critical ones is scaled by their fraction, that of the
    others dropped. All decay; momentum moves weights that were critical a moment ago. Batch norm and biases follow their whole
    gradient. CDR works from the first epoch on.

    Where paper and code differ, the defaults are the code's, which made the published figures: the fraction is constant (the
    code overwrites its own gradual list), and weights decay by the optimizer's squared norm (the paper: absolute values).
    The published figures are of the epoch that is best on a noisy validation split: ``data.val_fraction: 0.1`` and a
    ``ModelCheckpoint`` that monitors ``val/acc``.

    Under SANM the loss is that of :class:`CrossEntropy` under SANM, and the gradient of the reconstruction is masked with the
    rest: one backward pass. The decoder is not part of the network; its weights follow their whole gradient and do not compete.

    Args:
        num_classes: C.
        noise_rate: fraction of wrong labels, known or guessed, in [0, 1); never read from the data. There is no default.
        schedule: ``"constant"`` (released code) or ``"gradual"``.
        num_gradual: epochs of the gradual schedule.
        decay: ``"l2"`` leaves decay to the optimizer; ``"l1"`` adds ``l1_decay`` sign(w) to the gradient of these weights (the
            paper's form) and wants an optimizer without weight decay.
        l1_decay: factor of the paper's form, >= 0.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` is SANM's alone.

    Raises:
        ValueError: if an argument is out of its range, or two decays are asked for.
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
        if noise_rate is None or not 0 <= noise_rate < 1:
            raise ValueError(
                f"expected noise_rate in [0, 1), got {noise_rate}; give the fraction of wrong labels, known or guessed"
            )
        if schedule not in ("constant", "gradual") or num_gradual < 0:
            raise ValueError(
                f"expected schedule 'constant' or 'gradual' and num_gradual >= 0, got {schedule!r} and {num_gradual}"
            )
        if decay not in ("l1", "l2") or l1_decay < 0:
            raise ValueError(f"expected decay 'l1' or 'l2' and l1_decay >= 0, got {decay!r} and {l1_decay}")
        super().__init__(num_classes, **kwargs)
        self.noise_rate, self.schedule, self.num_gradual = noise_rate, schedule, num_gradual
        self.decay, self.l1_decay = decay, l1_decay

    def competing(self) -> list[nn.Parameter]:
        """Return the weights that compete: those of the network with two dimensions or more."""
        return [weight for weight in self.network.parameters() if weight.ndim >= 2 and weight.requires_grad]

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradient of all but the critical weights; gradients are unscaled here and not yet clipped."""
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
        """Make the optimizer and its schedule; two decays at once are refused."""
        made: Any = super().configure_optimizers()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        decays = [group.get("weight_decay", 0) for group in optimizer.param_groups]
        if self.decay == "l1" and any(decays):
            raise ValueError(
                f"expected an optimizer with weight_decay 0 beside decay: l1, got {max(decays)}; set it to 0"
            )
        return made
