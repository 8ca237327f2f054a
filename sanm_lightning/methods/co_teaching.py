"""Co-teaching (Han et al., NeurIPS 2018): two networks choose small-loss samples for each other."""

from typing import Any

import torch
from torch import Tensor, nn

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.two_networks import TwoNetworks
from sanm_lightning.sanm.quality import label_loss

__all__ = ["CoTeaching", "forget_share", "small_loss"]


def forget_share(epoch: int, forget_rate: float, num_gradual: int, exponent: float = 1.0) -> float:
    """Return R(e), the share of a batch that is left out in an epoch.

    It rises linearly from 0 to ``forget_rate ** exponent`` over the first ``num_gradual`` epochs, and is ``forget_rate`` after
    them. Source: the authors' code.
    """
    if epoch >= num_gradual:
        return forget_rate
    return float(forget_rate**exponent) * epoch / max(1, num_gradual - 1)


def small_loss(losses: Tensor, share: float) -> Tensor:
    """Return the positions of the int(share B) samples of smallest loss, at least one: losses (B,) -> (K,)."""
    kept = max(1, int(share * len(losses) + 1e-6))  # .3 * 10 is 2.9999... in floating point
    return losses.topk(kept, largest=False, sorted=False).indices


class CoTeaching(TwoNetworks):
    """Each network learns from the samples of a batch that its peer has the smallest losses on.

    Source: Han et al., NeurIPS 2018, Algorithm 1, and the authors' code. The code starts at the second entry of its schedule;
    here the first epoch keeps everything.

    Prediction: each network alone, as published. ``forward`` and ``test/acc`` are network 1, ``test/acc_network2`` the other.

    Under SANM each network masks for itself, by its peer's estimate of label quality. What is chosen is chosen by the losses
    of unmasked images: those of masked ones would rank by the size of the mask. The reconstruction needs no label and takes
    the whole batch.

    Args:
        num_classes: C.
        network: timm model name, or a network by timm's conventions; the published one is ``cnn9``.
        forget_rate: share of a batch that is left out in the end, in [0, 1); published: the noise rate, which somebody has to
            know or guess. It is never read from the data. The default is cautious: the share of wrong labels is rarely lower
            in data collected from the web.
        num_gradual: epochs in which the share rises from 0. A class that the network has not begun to learn by then may never
            be chosen again: with 5 on 5,000 images of CIFAR-10, half of the labels wrong, two of ten classes were lost (on both
            of the seeds looked at).
        exponent: of the forget rate, for the rise.
        released_scale: divide each network's mean loss by the number of chosen samples once more, as the authors' code does;
            with Adam it changes next to nothing.
        warmup_epochs: epochs before SANM masks; published methods have none, the share has reached its end after
            ``num_gradual`` epochs.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        network: str | nn.Module = "cnn9",
        forget_rate: float = 0.2,
        num_gradual: int = 10,
        exponent: float = 1.0,
        released_scale: bool = False,
        warmup_epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        if not 0 <= forget_rate < 1:
            raise ValueError(
                f"expected forget_rate in [0, 1), got {forget_rate}; the share of wrong labels is a good choice"
            )
        if num_gradual < 0 or exponent <= 0:
            raise ValueError(f"expected num_gradual >= 0 and exponent > 0, got {num_gradual} and {exponent}")
        super().__init__(num_classes, network=network, warmup_epochs=warmup_epochs, **kwargs)
        self.forget_rate, self.num_gradual, self.exponent = forget_rate, num_gradual, exponent
        self.released_scale = released_scale

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the sum of both networks' losses on what the other one chose."""
        batch = NoisyBatch(*batch)
        targets = self.one_hot(batch.labels)
        share = 1 - forget_share(self.current_epoch, self.forget_rate, self.num_gradual, self.exponent)
        seen, chosen = [], []
        for network, sanm, peer in self.pairs:
            views = sanm(network, batch.images, targets, self.peer_quality(batch, targets, peer))
            features = network.forward_features(views.images)
            logits = network.forward_head(features)
            unmasked = views.unmasked(logits)
            chosen.append(small_loss(label_loss(unmasked.detach(), targets), share))
            if sanm.enabled:
                sanm.label_quality.observe(unmasked, targets, batch.index)
            seen.append((views, logits, sanm.reconstruction(features, batch.images)))
        total = torch.zeros((), device=targets.device)
        for (views, logits, reconstruction), choice in zip(seen, reversed(chosen), strict=True):
            rows = views.rows(choice, len(targets))
            loss = label_loss(logits[rows], views.targets[rows]).mean()
            total = total + (loss / len(choice) if self.released_scale else loss) + reconstruction
        return total

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, C) of network 1."""
        logits: Tensor = self.network(images)
        return logits

    def _evaluate(self, batch: NoisyBatch, name: str) -> None:
        super()._evaluate(batch, name)
        self._count(f"{name}_network2", f"{name}/acc_network2", self.network2(batch[0]), batch[1])
