"""Hooks of a method, with the defaults of standard training."""

import copy
from typing import Any, cast

import lightning as L
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.batch import EpochPlan, View
from sanm_lightning.callbacks import Stage, Unaveraged, locate
from sanm_lightning.per_sample import LabelStore
from sanm_lightning.sanm.module import SANM

__all__ = ["MethodHooks"]


class MethodHooks(Unaveraged, L.LightningModule):
    """Hooks for stages, views, samples and label quality of a method."""

    num_classes: int
    warmup_epochs: int
    num_networks = 1
    """1 or 2. Each of two networks is masked according to the other's estimate of label quality."""
    needs_data_module = False
    """Whether the method selects its samples or views, or predicts the training set."""
    estimates_quality = False
    """Whether the method estimates label quality in :meth:`label_quality`."""
    trains_classifier = True
    """False for methods that train only an encoder, whose predictions are not meaningful."""

    @property
    def networks(self) -> list[Any]:
        """The trained networks."""
        return [getattr(self, name) for name in ("network", "network2")[: self.num_networks]]

    @property
    def prediction_networks(self) -> list[Any]:
        """The networks whose mean logits are the prediction, and which are exported; by default, the trained ones."""
        return self.networks

    def standalone_networks(self) -> list[Any]:
        """Return copies of :attr:`prediction_networks` that predict the same without the method, for export."""
        return [copy.deepcopy(network) for network in self.prediction_networks]

    @property
    def sanms(self) -> list[SANM]:
        """The SANM of each network."""
        return [getattr(self, name) for name in ("sanm", "sanm2")[: self.num_networks]]

    @property
    def given_labels(self) -> Tensor:
        """Given labels of the training set, shape (N,), int64, on the device of the module."""
        data: Any = cast(Any, self.trainer).datamodule
        return cast(Tensor, data.labels.to(self.device))

    @property
    def has_val_split(self) -> bool:
        """Whether the data module is one of this package and has a validation split, for ``predict_val``."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return hasattr(data, "pass_dataloader") and "val" in data.eval_names

    def known_labels(self, path: str) -> tuple[Tensor, Tensor]:
        """Read a file of known labels of training samples: positions (P,) and labels (P,), int64, on the CPU.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is invalid, or has no sample of the training split.
        """
        data: Any = cast(Any, self.trainer).datamodule
        found: tuple[Tensor, Tensor] = data.known_labels(path)
        return found

    def stages(self) -> list[Stage]:
        """Return the stages of the training, in order."""
        return [Stage("train")]

    def views(self) -> tuple[View, ...]:
        """Return the view policies of the current stage, in the order of ``batch.views``."""
        return ("weak",)

    def epoch_batches(self, plan: EpochPlan) -> Tensor | None:
        """Select the samples of every step of this process in the current epoch.

        Args:
            plan: numbers of steps and samples, the pool of positions, and the epoch number for random draws.

        Returns:
            Positions in the training set, shape (S, B), with S = ``plan.steps``; duplicates are allowed. None uses the
            loader's shuffled batches. The result must be a function of epoch, seed and saved state, because it is
            computed again when a run is resumed in mid-epoch.
        """
        return None

    def begin_epoch(self) -> None:
        """Run once per epoch, before its first batch is fetched; not repeated in a resumed epoch."""

    def begin_stage(self) -> None:
        """Run once before the first epoch of each stage after the first one, before its reset and :meth:`begin_epoch`."""

    def after_optimizer_step(self) -> None:
        """Run after each optimizer step, before a checkpoint can be saved; not in the trials of Lightning's finders."""

    def check_training_set(self, num_samples: int, batch_size: int, world_size: int) -> None:
        """Raise ValueError for a training set that the method does not support."""

    def label_quality(self) -> Tensor | None:
        """Return the method's estimate of the quality of each given label, (N,), in [0, 1]; None if not available.

        The default is the ``given_quality`` of the :class:`LabelStore` of a method with ``estimates_quality``, and None
        before anything is written to it.
        """
        stores = [part for part in self.children() if isinstance(part, LabelStore) and self.estimates_quality]
        return next((store.given_quality for store in stores if store.filled), None)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, C, H, W) in [0, 1], averaged over the networks."""
        logits: list[Tensor] = [network(images) for network in self.prediction_networks]
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    @property
    def stage(self) -> Stage:
        """The stage of the current epoch."""
        return locate(self.stages(), self.current_epoch)[1]

    @property
    def stage_epoch(self) -> int:
        """Number of the current epoch in its stage, from 0."""
        return self.current_epoch - locate(self.stages(), self.current_epoch)[2]

    def elapsed_epochs(self, batch_idx: int) -> float:
        """Return the epochs since the start of the stage, with the elapsed fraction of the current one."""
        return self.stage_epoch + batch_idx / max(1, int(self.trainer.num_training_batches))

    @property
    def total_epochs(self) -> int | None:
        """``max_epochs`` of the trainer; None if there is no trainer or no limit."""
        epochs = None if self._trainer is None else self._trainer.max_epochs
        return None if epochs is None or epochs < 0 else epochs

    def fraction_of_run(self, numerator: int, denominator: int, after: int | None = None) -> int:
        """Return a fraction of the epochs ``after`` the warm-up or another number of epochs, rounded down.

        It is ``numerator`` epochs if ``max_epochs`` is unknown.
        """
        if self.total_epochs is None:
            return numerator
        return max(0, self.total_epochs - (self.warmup_epochs if after is None else after)) * numerator // denominator

    def one_hot(self, labels: Tensor) -> Tensor:
        """Convert labels (B,) to one-hot targets (B, C), float32; class probabilities (B, C) are returned unchanged.

        Raises:
            ValueError: (on CPU) if a label is outside [0, C).
        """
        if labels.is_floating_point():
            return labels
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(
                f"expected class indices in [0, {self.num_classes}), the num_classes of {type(self).__name__}, got "
                f"{int(labels.min())} to {int(labels.max())}; set num_classes, and remove samples without a class"
            )
        return F.one_hot(labels, self.num_classes).float()
