"""The callback that draws the pictures of a run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.functional import clean_probability
from sanm_lightning.methods import NoisyLabelModule
from sanm_lightning.pictures.charts import (
    QUANTILES,
    histogram_figure,
    quality_figure,
    roc_figure,
    transition_figure,
)
from sanm_lightning.pictures.evidence import (
    Pass,
    class_names,
    known_quality,
    losses,
    own_data,
    pass_over,
    recent_quality,
    sanms,
    wrong_labels,
)
from sanm_lightning.pictures.loggers import log_picture
from sanm_lightning.pictures.look import Look, choose
from sanm_lightning.pictures.masks import samples_figure
from sanm_lightning.pictures.style import save
from sanm_lightning.sanm.callback import WARMUP_EPOCHS, SANMCallback
from sanm_lightning.sanm.estimate import own_estimate
from sanm_lightning.sanm.module import SANM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SANMPictures"]

FOLDER = "pictures"
KEPT = 64
"""Samples of a foreign loader that are kept of each epoch."""


class SANMPictures(L.Callback):
    """Write pictures of the run to ``pictures/`` in the run directory, and to the loggers, at the end of a fit.

    ======================  ==============================================================================================
    ``masks.png``           Samples believed right and believed wrong, those of the highest and of the lowest label quality:
                            image, activation map, masked view and reconstruction; given, true and predicted class, label
                            quality G and mask ratio. With SANM only.
    ``losses.png``          Histogram of the losses with the two components of the mixture and the loss of posterior .5.
    ``quality.png``         Label quality over the epochs.
    ``roc.png``             ROC curve of label quality as a score for wrong labels, where true labels are known.
    ``transition.png``      Given labels by predicted class over the training set, and by true class where it is known.
    ======================  ==============================================================================================

    Samples are never chosen by true labels, which are only displayed. A picture whose data are not known is left out. Nothing
    is drawn in a training step: label quality is recorded at the end of each epoch, in the state of this callback, so that a
    resumed run shows all epochs. Process zero draws; the pass over the training set is shared by all processes.

    With data modules of other packages and with plain loaders the samples come from the first training batch of the last
    epoch. Loggers receive the pictures through their own methods for images, see
    :func:`~sanm_lightning.pictures.loggers.log_picture`.

    Args:
        num_images: number of samples in ``masks.png``, half of them believed right.
        predict: run the networks over the training set once at the end of the training, with a data module of this package.
            Required for ``transition.png``, and without SANM for ``losses.png`` and ``roc.png``.

    Raises:
        ValueError: if ``num_images`` is not positive.
    """

    def __init__(self, num_images: int = 10, predict: bool = True) -> None:
        if num_images < 1:
            raise ValueError(f"expected num_images >= 1, got {num_images}")
        self.num_images, self.predict = num_images, predict
        self.history: dict[int, dict[str, Any]] = {}
        """Label quality for each number of finished epochs: quantiles and the means of right and wrong labels."""
        self._kept: NoisyBatch | None = None  # first batch of the epoch, where samples cannot be looked up
        self._pass: Pass | None = None
        self._directory = Path()
        self._drawn = False

    # Collecting

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare a fit."""
        if stage != "fit":
            return
        self._directory = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast, which every rank must call
        self._kept = self._pass = None
        self._drawn = False
        if trainer.current_epoch == 0:  # a checkpoint is loaded after this hook
            self.history = {}

    def on_train_batch_start(self, trainer: Any, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep samples of the first batch of an epoch, where they cannot be looked up later."""
        if batch_idx == 0 and trainer.is_global_zero and own_data(trainer) is None:
            with contextlib.suppress(ValueError):  # a batch without images or labels
                read = NoisyBatch.from_any(batch)._replace(views=())
                self._kept = read.take(torch.arange(min(KEPT, len(read.images)), device=read.images.device))  # a copy

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Record the label quality that was in use in this epoch."""
        self._record(trainer, pl_module, trainer.current_epoch)

    def _record(self, trainer: Any, pl_module: L.LightningModule, epochs: int) -> None:
        parts = sanms(trainer, pl_module)
        quality, seen = known_quality(pl_module, parts)
        wrong = wrong_labels(trainer)
        if quality is None or seen is None:
            quality, wrong = recent_quality(parts), None
        elif wrong is None or len(wrong) != len(quality):
            quality, wrong = quality[seen], None
        else:
            quality, wrong = quality[seen], wrong[seen]
        if quality is None or not len(quality):
            return
        means = {"right": None, "wrong": None} if wrong is None else {
            "right": _mean(quality[~wrong]), "wrong": _mean(quality[wrong])
        }  # fmt: skip
        probabilities = torch.tensor(QUANTILES, dtype=torch.float64)
        at = (probabilities * (len(quality) - 1)).round().long()  # torch.quantile refuses large sets
        self.history[epochs] = {"quantiles": quality.sort().values[at].tolist(), **means}

    # Drawing

    def on_fit_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Run a pass over the training set; draw if SANM's callbacks have processed the last epoch. A collective operation."""
        if self.predict and not trainer.fast_dev_run:
            self._pass = pass_over(trainer, pl_module)
        later = trainer.callbacks[trainer.callbacks.index(self) :]
        if not any(isinstance(part, SANMCallback) for part in later):
            self._draw(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Draw, if that was not possible before, and release the samples."""
        if stage == "fit":
            self._draw(trainer, pl_module)
            self._kept = self._pass = None

    def _draw(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Draw all pictures in process zero, without communication."""
        if self._drawn or trainer.fast_dev_run:
            return
        self._drawn = True
        if own_estimate(pl_module, sanms(trainer, pl_module)) is None:  # which is updated at the start of an epoch
            self._record(trainer, pl_module, trainer.current_epoch)
        if not trainer.is_global_zero:
            return
        for name, make in self._pictures(trainer, pl_module):
            try:
                figure = make()
                if figure is None:
                    continue
                path = self._directory / FOLDER / f"{name}.png"
                save(figure, path)
            except Exception as error:  # a picture is not worth a finished training
                rank_zero_warn(f"the picture {name!r} could not be drawn ({type(error).__name__}: {error})")
            else:
                log_picture(trainer.loggers, f"{FOLDER}/{name}", figure, path, trainer.global_step)

    def _pictures(
        self, trainer: Any, pl_module: L.LightningModule
    ) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
        parts, wrong = sanms(trainer, pl_module), wrong_labels(trainer)
        yield "masks", lambda: self._masks(trainer, pl_module, parts)
        yield "losses", lambda: histogram_figure(found) if (found := losses(parts, self._pass, wrong)) else None
        yield "quality", lambda: self._quality(pl_module, parts)
        yield "roc", lambda: self._roc(pl_module, parts, wrong)
        yield "transition", lambda: self._transition(trainer, pl_module)

    def _quality(self, pl_module: Any, parts: list[SANM]) -> Figure | None:
        if not self.history:
            return None
        warmup = pl_module.warmup_epochs if isinstance(pl_module, NoisyLabelModule) else WARMUP_EPOCHS
        masked = [epoch for epoch in range(max(self.history) + 1) if parts and parts[0].masking(epoch, warmup)]
        return quality_figure(self.history, masked[0] if masked and parts[0].mask else None)

    def _roc(self, pl_module: Any, parts: list[SANM], wrong: Tensor | None) -> Figure | None:
        quality, seen = known_quality(pl_module, parts)
        title = "Wrong labels found by label quality"
        if quality is not None and seen is not None and wrong is not None and len(wrong) == len(quality):
            quality, wrong = quality[seen], wrong[seen]
        elif not parts and self._pass is not None and wrong is not None:
            quality = torch.stack([clean_probability(values) for values in self._pass.loss]).mean(0)
            wrong = wrong[self._pass.positions]
            title = "Wrong labels found by the loss mixture"
        else:
            return None
        return roc_figure(quality, wrong, title) if bool(wrong.any()) and not bool(wrong.all()) else None

    def _transition(self, trainer: Any, pl_module: Any) -> Figure | None:
        data = own_data(trainer)
        if self._pass is None or data is None:
            return None
        table, classes = data.table("train"), int(pl_module.num_classes)
        given = table.labels[self._pass.positions]
        counts = [_counts(predicted, given, classes) for predicted in self._pass.predictions]
        panels = [("Estimated", "predicted class", torch.stack(counts).sum(0))]
        if table.true_labels is not None:
            true = table.true_labels[self._pass.positions]
            panels.append(("True", "true class", _counts(true, given, classes)))
        return transition_figure(panels, class_names(trainer, pl_module, classes))

    def _masks(self, trainer: Any, pl_module: Any, parts: list[SANM]) -> Figure | None:
        look = self._look(trainer, pl_module, parts)
        if look is None:
            return None
        quality, seen = known_quality(pl_module, parts)
        data = own_data(trainer)
        if data is not None and quality is not None and seen is not None:
            known = seen.nonzero()[:, 0]
            groups = [
                (data.batch("train", rows), quality[rows])
                for rows in (known[part] for part in choose(quality[known], self.num_images, look.sanm.seed))
            ]
        elif data is None and self._kept is not None:
            batch = self._kept
            judged = quality is not None and batch.index is not None
            believed = quality[batch.index.cpu()] if judged else look.quality(batch)  # type: ignore[index, union-attr]
            groups = [(batch.take(rows), believed[rows]) for rows in choose(believed, self.num_images, look.sanm.seed)]
        else:
            return None
        headings = ("Believed right: highest G", "Believed wrong: lowest G")
        blocks = [look.block(head, *group) for head, group in zip(headings, groups, strict=True) if len(group[1])]
        return samples_figure(blocks)

    def _look(self, trainer: Any, pl_module: Any, parts: list[SANM]) -> Look | None:
        """Return the first network and its SANM, where it masks."""
        if not parts or not parts[0].mask:
            return None
        if isinstance(pl_module, NoisyLabelModule):
            network, classes = pl_module.networks[0], pl_module.num_classes
        else:
            taps = [part.tap for part in trainer.callbacks if isinstance(part, SANMCallback) and part.tap is not None]
            if not taps:
                return None
            network, classes = taps[0], taps[0].num_classes
        return Look(network, parts[0], classes, class_names(trainer, pl_module, classes))

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the label quality of all epochs."""
        return {"history": copy.deepcopy(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; that of earlier versions is empty."""
        self.history = copy.deepcopy(dict(state_dict.get("history", {})))


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _counts(rows: Tensor, given: Tensor, classes: int) -> Tensor:
    """Count given labels (columns) for each class of ``rows``, (C, C)."""
    return torch.bincount(rows * classes + given, minlength=classes * classes).view(classes, classes)
