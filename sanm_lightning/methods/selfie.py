"""SELFIE (Song et al., ICML 2019): small-loss samples, and samples whose labels are replaced by consistent predictions."""

from typing import Any

import torch
from torch import Tensor

from sanm_lightning.callbacks import Stage, repeated_stages
from sanm_lightning.functional import refurbish, refurbished_quality, small_loss, soft_cross_entropy
from sanm_lightning.methods.base import NoisyLabelModule
from sanm_lightning.methods.checks import check_range, require, require_noise_rate
from sanm_lightning.per_sample import History, Refurbished

__all__ = ["SELFIE", "Refurbished"]


class SELFIE(NoisyLabelModule):
    """Train on the samples of small loss, and on those whose predictions agree, with the predicted label.

    Source: Song et al., ICML 2019, Algorithm 1, and the authors' code. The first stage of a run uses all samples.

    Departures: predictions are those of the training steps on unmasked images, where the code uses a further pass. A label is
    replaced only after ``history`` predictions, where the code counts missing ones as class 0 (``released_zero_history``).

    Under SANM, losses are those of unmasked images; label quality is that of ``functional.refurbished_quality``.

    Args:
        num_classes: C, number of classes.
        noise_rate: fraction of a batch that is not selected by its loss, in [0, 1). Required, never read from the data.
        uncertainty: largest normalized entropy of consistent predictions, in [0, 1]; published: 0.05.
        history: number of the last predictions of a sample; None is the published 15, or the epochs of a run if fewer.
        restarts: number of further runs, with a new network and the replaced labels; published: 2.
        run_epochs: epochs of each run but the last; None divides ``max_epochs``, which a resumed run must then not change.
        released_zero_history: whether missing predictions count as class 0.
        warmup_epochs: length of the first stage of every run.

    All other arguments are those of :class:`NoisyLabelModule`.

    Raises:
        ValueError: if an argument is out of its range, ``noise_rate`` is missing, ``history`` is longer than a run, or
            batches have no index.
    """

    needs_data_module = True
    estimates_quality = True

    def __init__(
        self,
        num_classes: int,
        noise_rate: float | None = None,
        uncertainty: float = 0.05,
        history: int | None = None,
        restarts: int = 0,
        run_epochs: int | None = None,
        released_zero_history: bool = False,
        warmup_epochs: int = 25,
        **kwargs: Any,
    ) -> None:
        noise_rate = require_noise_rate(noise_rate)
        check_range("in [0, 1]", uncertainty=uncertainty)
        check_range(">= 1 or null", history=history)
        check_range(">= 0", restarts=restarts)
        longer = run_epochs is None or run_epochs > warmup_epochs
        require(longer, f"run_epochs above the {warmup_epochs} warmup_epochs", run_epochs, "raise run_epochs")
        super().__init__(num_classes, warmup_epochs=warmup_epochs, **kwargs)
        self.noise_rate, self.uncertainty, self.history = noise_rate, uncertainty, history
        self.restarts, self.run_epochs, self.released_zero_history = restarts, run_epochs, released_zero_history
        self.predicted = History(history or 15, dtype=torch.int64)
        self.refurbished = Refurbished(noise_rate)

    @property
    def epochs_per_run(self) -> int:
        """Epochs of each run but the last one; 100 if ``max_epochs`` is unknown."""
        return self.run_epochs or (self.total_epochs or 100 * (self.restarts + 1)) // (self.restarts + 1)

    def stages(self) -> list[Stage]:
        """Return the two stages of each run."""
        length = max(0, self.epochs_per_run - self.warmup_epochs)
        return repeated_stages([Stage("warmup", self.warmup_epochs), Stage("refurbish", length)], self.restarts + 1)

    def begin_stage(self) -> None:
        """Before a restart, lower the noise rate, and delete the predictions."""
        if self.stage.name.startswith("warmup"):
            self.refurbished.restart()
            self.predicted.reset(len(self.predicted))

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Require a history that is not longer than a run."""
        length = f"a history of at most the {self.epochs_per_run} epochs of a run of SELFIE"
        require((self.history or 0) <= self.epochs_per_run, length, self.history, "lower history")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        batch, index = self.indexed(batch)
        store = self.refurbished
        labels, warmup = store.labels[index], self.stage.name.startswith("warmup")
        if not warmup:
            votes = self.predicted.votes(index, self.num_classes, self.released_zero_history)
            required = max(1, min(self.predicted.length, self.epochs_per_run))
            found = refurbish(votes, required, self.uncertainty, labels, store.replaced[index])
            labels = found.labels
        quality = None if self.current_epoch < self.warmup_epochs else store.quality[index]
        out = self.learn(batch._replace(labels=labels), self.one_hot(labels), quality=quality)
        self.predicted.append(index, out.unmasked_logits().argmax(1))
        if warmup:
            return out.cross_entropy()
        losses = soft_cross_entropy(out.unmasked_logits(), self.one_hot(batch.labels))
        quality = refurbished_quality(found, losses, store.quality[index])
        store.record(index, batch.labels, found.labels, found.replaced, quality)
        return out.cross_entropy(small_loss(losses, 1 - store.noise_rate, round_up=True) | found.replaced)
