"""Number of forward and backward passes of a training run."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from sanm_lightning.methods.ema import EMA

__all__ = ["BACKWARD_COST", "EpochPasses", "PassCounter", "count_passes"]

BACKWARD_COST = 2.0
"""Operations of a backward pass over those of the forward pass: the gradients of the input and of the weights."""


class EpochPasses(NamedTuple):
    """Passes of an epoch, in units of one pass of one network over the training set."""

    stage: str
    """Name of the method's stage."""
    masked: bool
    """Whether SANM masks images in this epoch."""
    forward: float
    """Forward passes in training steps, with and without gradient."""
    backward: float
    """Backward passes."""
    between_steps: float
    """Forward passes outside training steps, without those of validation and test."""

    @property
    def cost(self) -> float:
        """All passes of the epoch, in units of one forward pass over the training set."""
        return self.forward + self.between_steps + BACKWARD_COST * self.backward


class PassCounter(L.Callback):
    """Count the images that pass through the networks of a method in training.

    Networks are those that the method trains, and their averaged copies (teachers). A pass is a call of ``forward_features``,
    which is that of the whole network up to the classifier; decoders, small heads and frozen networks for masks are not
    counted. In several processes, the passes are those of one process. The trainer needs a data module of this package.
    """

    def __init__(self) -> None:
        self.epochs: list[EpochPasses] = []
        """Passes of each epoch that was finished."""
        self._images: Counter[str] = Counter()
        self._watched: list[Any] = []
        self._place = "between_steps"
        self._inside = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Attach the counter to the networks."""
        self._watched = list(_networks(pl_module))
        for network in self._watched:
            network.forward_features = self._counted(network.forward_features)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Detach the counter."""
        for network in self._watched:
            network.__dict__.pop("forward_features", None)
        self._watched = []

    def _counted(self, forward_features: Any) -> Any:
        def counted(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._inside:
                return forward_features(images, *args, **kwargs)  # type: ignore[no-any-return]
            self._inside = True
            try:
                features: Tensor = forward_features(images, *args, **kwargs)
            finally:
                self._inside = False
            self._images[self._place] += len(images)
            if features.requires_grad:
                features.register_hook(lambda _: self._images.update(backward=len(images)))
            return features

        return counted

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the following passes as those of a step."""
        self._place = "forward"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the following passes as those between steps."""
        self._place = "between_steps"

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count the following passes as those of an evaluation, which :attr:`epochs` does not contain."""
        self._place = "evaluation"

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Continue to count."""
        self._place = "between_steps"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Store the counts of the epoch."""
        size = trainer.datamodule.split_size("train")
        masked = pl_module.sanm.masking(trainer.current_epoch, pl_module.warmup_epochs)
        counts = (self._images[name] / size for name in EpochPasses._fields[2:])
        self.epochs.append(EpochPasses(pl_module.stage.name, masked, *counts))
        self._images.clear()


def count_passes(module: Any, data: Any, max_epochs: int) -> list[EpochPasses]:
    """Train a method on the CPU, and return the passes of each epoch.

    The number of passes per sample does not depend on the network or on the size of the set: a small network on a few images
    shows those of a full run.

    Args:
        module: method to train; its weights change.
        data: data module of this package; ``batch_size`` should divide the number of samples.
        max_epochs: number of epochs, more than those of the warm-up.
    """
    counter = PassCounter()
    trainer = L.Trainer(
        max_epochs=max_epochs, accelerator="cpu", devices=1, callbacks=[counter], logger=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return counter.epochs


def _networks(module: Any) -> Iterable[Any]:
    """Return the networks of a method, and their averaged copies."""
    yield from module.networks
    averages = (part.module for part in module.modules() if isinstance(part, EMA))
    yield from (average for average in averages if hasattr(average, "forward_features"))
