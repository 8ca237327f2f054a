"""ELR (Liu et al., NeurIPS 2020): what the network predicted early on holds it back from memorising wrong labels."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.per_sample_old import TargetBank

__all__ = ["ELR", "clamped_probabilities", "early_learning_regularization", "indices_of"]


def clamped_probabilities(logits: Tensor) -> Tensor:
    """Logits (B, C) -> probabilities (B, C) float32 within [1e-4, 1 - 1e-4], so that log(1 - <t, p>) stays finite."""
    return logits.float().softmax(1).clamp(1e-4, 1 - 1e-4)


def early_learning_regularization(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean of log(1 - <t, p>): probabilities (B, C) with gradient, targets (B, C) without -> a scalar <= 0.

    Source: Liu et al., NeurIPS 2020, Eq. 6. It falls without bound as p comes near t: a negative loss is not a fault.
    """
    return (1 - (probabilities * targets.detach()).sum(1)).log().mean()


def indices_of(batch: NoisyBatch, method: str) -> Tensor:
    """Return the positions (B,) of a batch's samples in the training set.

    Raises:
        ValueError: if the batch has none.
    """
    if batch.index is None:
        raise ValueError(
            f"{method} remembers what it predicted for each sample, so a batch needs positions in the training set, got none; "
            "use a data module of this package, or batches NoisyBatch(images, labels, index)"
        )
    return batch.index


class ELR(NoisyLabelModule):
    """Cross-entropy, and a term that pulls predictions towards their own running mean.

    Source: Liu et al., NeurIPS 2020, Algorithm 1, and the authors' code: the mean is updated with the present prediction before
    the loss is taken; probabilities are clamped to [1e-4, 1 - 1e-4]. Published on 45,000 of CIFAR's 50,000 images, the others
    held out for validation: ``data.val_fraction: 0.1``.

    Under SANM both terms see the masked views; the running mean is of unmasked images only. It can hurt: on 5,000 images of
    CIFAR-10 with half of the labels wrong, the last accuracy fell from .493 to .393 (three seeds). There ELR alone gave up some
    classes, and SANM, which judges a label by its loss, trusted their right labels by half only (looked at on one seed, where
    oracle quality did no harm). Look at the classes that such a network predicts.

    Args:
        num_classes: C.
        momentum: of the running mean, beta in the paper, in [0, 1).
        weight: of the term, lambda in the paper, >= 0; 0 is cross-entropy.

    All other arguments are those of :class:`NoisyLabelModule`; ``warmup_epochs`` says when SANM starts, ELR has no warm-up.

    Raises:
        ValueError: if an argument is out of its range, or batches have no index.
    """

    def __init__(self, num_classes: int, momentum: float = 0.7, weight: float = 3.0, **kwargs: Any) -> None:
        if weight < 0:
            raise ValueError(f"expected weight >= 0, got {weight}")
        super().__init__(num_classes, **kwargs)
        self.weight = weight
        self.targets = TargetBank(0, num_classes, momentum)

    def training_step(self, batch: NoisyBatch, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch = NoisyBatch(*batch)
        index, targets = indices_of(batch, "ELR"), self.one_hot(batch.labels)
        views = self.sanm(self.network, batch.images, targets, self.quality(batch, targets))
        features = self.network.forward_features(views.images)
        logits = self.network.forward_head(features)
        unmasked = views.unmasked(logits).detach()
        self.observe(batch, unmasked, targets)
        now = clamped_probabilities(unmasked)
        remembered = self.targets.update(index, now / now.sum(1, keepdim=True))
        copies = len(logits) // len(remembered)
        term = early_learning_regularization(clamped_probabilities(logits), remembered.repeat(copies, 1))
        loss = F.cross_entropy(logits, views.targets) + self.weight * term
        return loss + self.sanm.reconstruction(features, batch.images)

    def setup(self, stage: str) -> None:
        """Make room for the training samples."""
        fit_to_training_set(self, self.targets, stage)

    def on_train_epoch_end(self) -> None:
        """Share what the processes remember."""
        super().on_train_epoch_end()
        self.targets.merge()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what all processes remember."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"]["targets._extra_state"] = self.targets.complete_state()


def fit_to_training_set(module: NoisyLabelModule, bank: TargetBank, stage: str) -> None:
    """Give a bank the size of the training set, where that is known and not yet so.

    Raises:
        ValueError: if training starts without a data module that says how many samples it has.
    """
    if stage != "fit":
        return
    data = getattr(module.trainer, "datamodule", None)
    size = getattr(data, "num_samples", None)
    if not isinstance(size, int):
        raise ValueError(
            f"{type(module).__name__} remembers what it predicted for each sample and has to know how many there are; use a "
            f"data module with num_samples, got {type(data).__name__}"
        )
    if len(bank) != size:
        bank.resize(size)
