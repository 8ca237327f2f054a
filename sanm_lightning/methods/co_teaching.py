"""Co-teaching (Han et al., NeurIPS 2018): two networks select small-loss samples for each other."""

from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.functional import forget_rate as forget_rate_at
from sanm_lightning.functional import small_loss, soft_cross_entropy
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, require_noise_rate

__all__ = ["CoTeaching"]


class CoTeaching(NoisyLabelModule):
    """Each network is trained on the samples of a batch with the smallest losses of the other network.

    Source: Han et al., NeurIPS 2018, Algorithm 1, and the authors' code. The code starts at the second entry of its
    schedule; here, the first epoch keeps all samples.

    Prediction: each network separately, as published. ``forward`` and ``test/acc`` are network 1, ``test/acc_network2`` is
    network 2.

    Under SANM, each network is masked according to the other network's estimate of label quality. Samples are selected
    by the losses of unmasked images, because those of masked images depend on the size of the mask. The reconstruction
    uses the whole batch.

    Args:
        num_classes: C, number of classes.
        network: timm model name, or a network with timm's interface; published: ``cnn9``.
        noise_rate: final fraction of a batch that is excluded, in [0, 1); published: the noise rate, known or
            estimated. Required, and never read from the data.
        num_gradual: epochs over which the fraction increases from 0. Classes that are not learned by then may never be
            selected again: with 5 on 5,000 images of CIFAR-10 and half of the labels wrong, two of ten classes were
            lost (on both examined seeds).
        exponent: exponent of the noise rate during the increase.
        released_scale: whether to divide each network's mean loss by the number of selected samples once more, as in
            the authors' code; with Adam, the effect is negligible.
        warmup_epochs: epochs before SANM's first mask; the method has no warm-up.
        forget_rate: earlier name of ``noise_rate``.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, or ``noise_rate`` is missing.
    """

    num_networks = 2

    def __init__(
        self,
        num_classes: int,
        network: str | nn.Module = "cnn9",
        noise_rate: float | None = None,
        num_gradual: int = 10,
        exponent: float = 1.0,
        released_scale: bool = False,
        warmup_epochs: int = 10,
        forget_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        noise_rate = forget_rate if noise_rate is None else noise_rate
        noise_rate = require_noise_rate(noise_rate)
        check_range(">= 0", num_gradual=num_gradual)
        check_range("> 0", exponent=exponent)
        super().__init__(num_classes, network=network, warmup_epochs=warmup_epochs, **kwargs)
        self.noise_rate, self.num_gradual, self.exponent = noise_rate, num_gradual, exponent
        self.released_scale = released_scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses on the samples selected by the other network."""
        batch = NoisyBatch.from_any(batch)
        targets = self.one_hot(batch.labels)
        kept = 1 - forget_rate_at(self.current_epoch, self.noise_rate, self.num_gradual, self.exponent)
        seen = [self.learn(batch, targets, number) for number in (0, 1)]
        chosen = [small_loss(soft_cross_entropy(out.unmasked_logits(), targets), kept) for out in seen]
        total = torch.zeros((), device=targets.device)
        for out, choice in zip(seen, reversed(chosen), strict=True):
            loss = out.classification(choice)
            total = total + (loss / choice.sum() if self.released_scale else loss) + out.reconstruction
        return total

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of network 1 for images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.network(images)
        return logits

    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, C) of both networks for images (B, C, H, W)."""
        return {"acc": self(images), "acc_network2": self.network2(images)}
