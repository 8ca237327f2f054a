"""Splits of a data module, and their state in checkpoints: seed, labels and class names."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.class_names import named_classes, refuse_other_classes
from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.label_rows import FileLabels, read_known_labels
from sanm_lightning.data.label_table import LabelTable, OtherSamples
from sanm_lightning.data.list_files import PathList
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.serving import ServedBatches
from sanm_lightning.data.source import Source

__all__ = ["Splits"]

NAMED = 10
"""Maximum number of classes in a message."""

DRAWS = 4
"""Version of the random streams of noise, subset and split, saved in checkpoints."""


class Splits(ServedBatches):
    """Base class of `NoisyDataModule` that defines the split names and compares splits with those of a checkpoint."""

    val_fraction: float
    holdout_fraction: float
    track_test: bool
    _seed_is_given: bool
    noise: Noise
    _sources: dict[str, Source]
    _tables: dict[str, LabelTable]
    _stores: dict[str, ImageStore]
    _labels_on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]]
    _said: set[str]

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes; available after construction."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Class names, in the order of the class indices."""

    @property
    @abstractmethod
    def decode_size(self) -> tuple[int, int]:
        """(H, W) of decoded images in pixels; available after construction."""

    @abstractmethod
    def _source(self, name: str) -> Source:
        """Return the original set of ``train`` or one of `own_splits`, loaded once."""

    @property
    def own_splits(self) -> tuple[str, ...]:
        """Splits of the data besides the training set: ``val``, ``test``, further test sets; or none."""
        return ("test",)

    @property
    def held_out_fraction(self) -> float:
        """Fraction of the training samples that is held out as ``val``.

        This is ``val_fraction``, or ``holdout_fraction`` if ``val_fraction`` is 0 and `own_splits` is empty.
        """
        return self.val_fraction if self.val_fraction > 0 or self.own_splits else self.holdout_fraction

    @property
    def _holds_out(self) -> bool:
        """Whether samples are held out because the data have no evaluation split."""
        return self.val_fraction == 0 < self.held_out_fraction

    @property
    def eval_names(self) -> list[str]:
        """Names of the loaders of `val_dataloader`, in order: ``val`` if it exists, the test sets if tracked."""
        val = self.held_out_fraction > 0 or "val" in self.own_splits
        return (["val"] if val else []) + (self._own_tests if self.track_test else [])

    @property
    def test_names(self) -> list[str]:
        """Names of the loaders of `test_dataloader`, in order: the test sets, or ``val`` without one."""
        return self._own_tests or self.eval_names

    @property
    def _own_tests(self) -> list[str]:
        return [name for name in self.own_splits if name != "val"]

    def _other_paths(self) -> list[str]:
        """Return the paths of the other splits and of files left out, which a label file may also contain."""
        if self.noise.kind != "file" or self._source("train").paths is None:
            return []
        others = [path for name in self.own_splits for path in self._source(name).paths or []]
        return [*others, *(path for name in ("train", *self.own_splits) for path in self._source(name).left_out)]

    def sample_paths(self, split: str = "train") -> Sequence[str] | None:
        """Return the path of each sample of a split, relative to the root, with ``/``; None without files."""
        return self._paths_at(self.table(split).origin, split if split in self.own_splits else "train")

    def _paths_at(self, rows: Tensor, source: str) -> Sequence[str] | None:
        paths = self._source(source).paths
        if isinstance(paths, PathList):
            return paths.at(rows.numpy())
        return None if paths is None else [paths[row] for row in rows.tolist()]

    def original_set(self) -> tuple[Sequence[str] | None, FileLabels]:
        """Return paths, given labels and kept samples of the whole original training set, in its order.

        Samples of the training split and of a split held out from it have the labels of these splits; others have that of
        the label file, or the label of the original set. With injected noise, which they lack, they are not kept.
        """
        source = self._source("train")
        file = self.noise.read(source.labels, self.class_names, source.paths, self._other_paths())
        everything = torch.full((len(source.labels),), not self.noise.injects)
        labels, kept = file or FileLabels(source.labels.clone(), everything)
        held_out = ["val"] if self.held_out_fraction > 0 else []
        for table in map(self.table, ["train", *held_out]):
            labels[table.origin], kept[table.origin] = table.labels, True
        return source.paths, FileLabels(labels, kept)

    def other_samples(self, split: str = "train") -> OtherSamples | None:
        """Return the samples of the original training set that are not in a split of it; None if there are none."""
        return self._others_than(self.table(split).origin)

    def _others_than(self, origin: Tensor) -> OtherSamples | None:
        paths, (labels, kept) = self.original_set()
        other = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, origin, False)
        index = other.nonzero().flatten().tolist()
        if not index:
            return None
        names = None if paths is None else np.array([paths[row] for row in index], np.str_)
        return OtherSamples(np.array(index), names, labels[other].numpy(), ~kept[other].numpy())

    def known_labels(self, path: str) -> tuple[Tensor, Tensor]:
        """Read a file of known labels of training samples; see `read_known_labels`.

        Args:
            path: path of the file. Its indices are positions in the original training set, its paths are relative to the
                root.

        Returns:
            Positions in the training split, shape (P,), and labels, shape (P,). Samples that are not in the training
            split are left out, with one line in the log.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file is invalid, or has no sample of the training split.
        """
        source, origin = self._source("train"), self.table("train").origin
        size = len(source.labels)
        found, labels = read_known_labels(path, size, self.class_names, source.paths)
        place = torch.full((size,), -1).index_copy(0, origin, torch.arange(len(origin)))[found]
        here = place >= 0
        if not here.any():
            raise ValueError(
                f"expected known labels of samples of the training split in {str(path)!r}, got {len(found)} of samples "
                "outside of it; add samples of the training split"
            )
        if not here.all():
            self._say(f"{int((~here).sum())} of {len(here)} known labels are of samples outside of the training split")
        return place[here], labels[here]

    def source_images(self, split: str = "train") -> Any:
        """Return the original images of a split, uint8 (3, H, W), indexed by ``table(split).origin`` and decoded on access."""
        return self._source(split if split in self.own_splits else "train").images

    def _say(self, line: str) -> None:
        """Log a line once, in one process."""
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(line)

    def classes_without(self, labels: Tensor) -> str:
        """Return the names of the classes that do not occur in labels, for messages; empty if all occur."""
        empty = (labels.bincount(minlength=self.num_classes) == 0).nonzero().flatten().tolist()
        named = ", ".join(repr(self.class_names[label]) for label in empty[:NAMED])
        return named + (f" and {len(empty) - NAMED} more" if len(empty) > NAMED else "")

    def state_dict(self) -> dict[str, Any]:
        """Return seed, class names, a checksum of the training labels, which a resumed run compares, and image sizes."""
        return {
            "draws": DRAWS,
            "seed": self.seed,
            "labels": self.table("train").check_sum() if "train" in self._tables else None,
            "class_names": named_classes(self),
            "decode_size": list(self.decode_size),
            "resize": getattr(self, "resize", "crop"),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed of the resumed run, and compare class names and labels.

        A trained model can be evaluated on any data with the same classes, but a held-out split must be identical to
        that of training.

        Raises:
            ValueError: if the classes differ; or if training is resumed, or its held-out split evaluated, with
                different training labels or a different given seed (split and order of the samples depend on it).
        """
        refuse_other_classes(named_classes(self), state_dict.get("class_names"))
        evaluating = self.trainer is not None and self.trainer.state.fn != "fit"
        if evaluating and not self._evaluates_held_out():
            return
        if state_dict["seed"] != self.seed:
            if self._seed_is_given:
                raise ValueError(
                    f"expected the data seed of the resumed run, {state_dict['seed']}, got {self.seed}; use the same "
                    "seed, or omit it"
                )
            self._restart_from_seed(state_dict["seed"])
        if state_dict["labels"] not in (None, self.table("train").check_sum()):
            if state_dict.get("draws") != DRAWS:
                raise ValueError(
                    "expected the training labels of the resumed run, got different labels from a checkpoint of an "
                    "earlier version, which used other random streams for noise, subset and split; resume with that "
                    "version, or start a new run from its weights"
                )
            if evaluating:
                raise ValueError(
                    "expected the training labels of the checkpoint, from which the split 'val' is held out, got "
                    "different labels; use the same data, noise, subset and split, and seed "
                    f"{state_dict['seed']}, or data with a test split"
                )
            raise ValueError(
                "expected the training labels of the resumed run, got different labels; use the same data, noise, "
                f"subset and split, and seed {state_dict['seed']}"
            )

    def _evaluates_held_out(self) -> bool:
        validating = self.trainer is not None and self.trainer.state.fn == "validate"
        names: Sequence[str] = self.eval_names if validating else self.test_names
        return self.held_out_fraction > 0 and "val" in names

    def _share_seed(self) -> None:
        """Broadcast the seed; without ``seed_everything``, labels and order would differ between processes."""
        if self.trainer is not None and self.trainer.world_size > 1 and not self._seed_is_given:
            seed = self.trainer.strategy.broadcast(self.seed)
            if seed != self.seed:
                self._restart_from_seed(seed)

    def _restart_from_seed(self, seed: int) -> None:
        """Reload everything that was loaded: sources may depend on the seed; labels and splits do."""
        self.seed = seed
        ready = list(self._stores)
        self._sources.clear()
        self._tables.clear()
        self._stores.clear()
        self._labels_on_device.clear()
        for name in ready:
            self.store(name)
