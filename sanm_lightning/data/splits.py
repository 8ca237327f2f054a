"""Which splits a data module has, and what a checkpoint says of them: seed, labels, class names."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.class_names import named_classes, refuse_other_classes
from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.label_table import LabelTable
from sanm_lightning.data.serving import ServedBatches
from sanm_lightning.data.source import Source

__all__ = ["Splits"]

DRAWS = 3
"""Version of the random streams of noise, subset and split; a checkpoint says which one its labels were drawn by."""


class Splits(ServedBatches):
    """The part of `NoisyDataModule` that names its splits and holds a later run to those of a checkpoint."""

    val_fraction: float
    holdout_fraction: float
    track_test: bool
    _seed_is_given: bool
    _sources: dict[str, Source]
    _tables: dict[str, LabelTable]
    _stores: dict[str, ImageStore]
    _labels_on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]]

    @property
    def own_splits(self) -> tuple[str, ...]:
        """The splits that the data come with beside the training set: ``val``, ``test``, both or none."""
        return ("test",)

    @property
    def held_out_fraction(self) -> float:
        """Fraction of the training samples that is held out as ``val``: ``val_fraction``, or ``holdout_fraction`` in need."""
        return self.val_fraction if self.val_fraction > 0 or self.own_splits else self.holdout_fraction

    @property
    def _holds_out(self) -> bool:
        """Whether samples are held out because the data have no other ones to evaluate on."""
        return self.val_fraction == 0 < self.held_out_fraction

    @property
    def eval_names(self) -> list[str]:
        """What the loaders of `val_dataloader` are, in their order: ``val`` if there is one, ``test`` if tracked."""
        val = self.held_out_fraction > 0 or "val" in self.own_splits
        return (["val"] if val else []) + (["test"] if self.track_test and "test" in self.own_splits else [])

    @property
    def test_names(self) -> list[str]:
        """What the loaders of `test_dataloader` are, in their order: ``test``, or ``val`` where the data have no test split."""
        return ["test"] if "test" in self.own_splits else self.eval_names

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, the class names, and a check sum of the training labels, so that a resumed run has the same."""
        return {
            "draws": DRAWS,
            "seed": self.seed,
            "labels": self.table("train").check_sum() if "train" in self._tables else None,
            "class_names": named_classes(self),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the seed of the run, and compare class names and labels.

        A trained model may be evaluated on whatever data have its classes; but a held-out split has to be the one that was held
        out in training.

        Raises:
            ValueError: the classes are others; or training is resumed, or its held-out split evaluated, with other labels than
                it was begun with, or another seed was given: the split and the order of the samples depend on it.
        """
        refuse_other_classes(named_classes(self), state_dict.get("class_names"))
        evaluating = self.trainer is not None and self.trainer.state.fn != "fit"
        if evaluating and not self._evaluates_held_out():
            return
        if state_dict["seed"] != self.seed:
            if self._seed_is_given:
                raise ValueError(
                    f"expected the seed of the data of the run that is resumed, {state_dict['seed']}, got {self.seed}; give "
                    "the same, or none"
                )
            self._restart_from_seed(state_dict["seed"])
        if state_dict["labels"] not in (None, self.table("train").check_sum()):
            if state_dict.get("draws") != DRAWS:
                raise ValueError(
                    "expected the training labels of the run that is resumed, got others: the checkpoint is of an earlier "
                    "version, whose noise, subset and split it drew with its own random streams; go on with that version, or "
                    "begin a new run from its weights"
                )
            if evaluating:
                raise ValueError(
                    "expected the training labels of the checkpoint, from which the split 'val' is held out, got others; give "
                    f"the data module the same data, noise, subset and split, and seed {state_dict['seed']}, or data with a "
                    "test split"
                )
            raise ValueError(
                "expected the training labels of the run that is resumed, got others; give the data module the same data, "
                f"noise, subset and split, and seed {state_dict['seed']}"
            )

    def _evaluates_held_out(self) -> bool:
        validating = self.trainer is not None and self.trainer.state.fn == "validate"
        names: Sequence[str] = self.eval_names if validating else self.test_names
        return self.held_out_fraction > 0 and "val" in names

    def _share_seed(self) -> None:
        """Without ``seed_everything`` every process would have labels and an order of its own."""
        if self.trainer is not None and self.trainer.world_size > 1 and not self._seed_is_given:
            seed = self.trainer.strategy.broadcast(self.seed)
            if seed != self.seed:
                self._restart_from_seed(seed)

    def _restart_from_seed(self, seed: int) -> None:
        """Everything that was loaded is loaded again: sources may depend on the seed, and labels and splits do."""
        self.seed = seed
        ready = list(self._stores)
        for held in (self._sources, self._tables, self._stores, self._labels_on_device):
            held.clear()  # type: ignore[attr-defined]
        for name in ready:
            self.store(name)
