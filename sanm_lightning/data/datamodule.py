"""The data module that all data sets share: labels, splits, loaders, and the look-up and augmentation on the device."""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.data.loader import ImageDataset, IndexLoader, seeded_generator
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.policies import augment
from sanm_lightning.safe_files import write_whole

__all__ = ["NoisyDataModule", "Source"]

NO_NOISE = Noise()

SplitName = Literal["train", "val", "test"]


class Source(NamedTuple):
    """What a data set consists of, before subset, noise and splits.

    Attributes:
        labels: class indices, shape (N,), int64.
        images: shape (N, 3, H, W), uint8; or a map-style data set that decodes image i to (3, H, W), uint8, when it is
            asked for it, and not before.
    """

    labels: Tensor
    images: Tensor | ImageDataset


@dataclass
class _Split:
    """The part of a source that one loader serves. Images are resident (uint8), or streamed from a data set."""

    labels: Tensor  # given, (n,)
    true_labels: Tensor | None  # (n,)
    origin: Tensor  # position in the original set, (n,)
    images: Tensor | None = None
    dataset: ImageDataset | None = None
    on_device: dict[torch.device, "_Resident"] = field(default_factory=dict)


class _Resident(NamedTuple):
    labels: Tensor
    true_labels: Tensor | None
    images: Tensor | None


class _Rows(Dataset[Tensor]):
    """The rows of a source, in the order of a split."""

    def __init__(self, images: Tensor | ImageDataset, rows: list[int]) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[self.rows[index]]


class NoisyDataModule(L.LightningDataModule):
    """Images with labels that may be wrong: the base of all data sets here, and of your own.

    A subclass gives `num_classes` and `image_size`, and `load_train` and `load_test`, each a `Source`; if need be
    `prepare_data` for a download and `class_names`. From there on everything is shared: a class-balanced subset, label
    noise, a validation split, loaders that resume in mid-epoch, and random crops and flips on the device.

    Loaders serve indices. Images that fit in ``resident_bytes`` are decoded once, lie on the device as uint8, and are
    looked up there; larger sets are decoded by worker processes as they are needed. Either way a batch reaches the
    model as a `sanm_lightning.batch.NoisyBatch` with images in [0, 1]. Its ``index`` is the position in the split it
    comes from, for training 0 to ``num_samples`` - 1. The augmentation of a batch is a function of the seed, the epoch,
    the number of the batch and the process, so that a resumed run continues exactly.

    Args:
        root: folder of the data.
        batch_size: training samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        max_train_samples: train on a random, class-balanced subset of this size; by default on everything.
        noise: what is done to the training labels; by default nothing.
        val_fraction: share of the training samples, in [0, 1), held out for validation with their noisy labels.
        crop_padding: pixels of zero padding for random crops in training; 0 for no crops.
        flip: whether training images are mirrored at random.
        track_test: evaluate the test set after every epoch of training, for the field's "best" figures. For tracking
            only: a model that is chosen by it has seen the test set.
        resident_bytes: a split whose images take more bytes than this streams through workers.
        num_workers: worker processes that decode images.
        seed: of subset, noise, split, order and augmentation; by default torch's initial seed (``seed_everything``).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        eval_batch_size: int = 512,
        max_train_samples: int | None = None,
        noise: Noise = NO_NOISE,
        val_fraction: float = 0.0,
        crop_padding: int = 4,
        flip: bool = True,
        track_test: bool = True,
        resident_bytes: int = 2**31,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}: choose a larger one.")
        for name, value in (
            ("crop_padding", crop_padding),
            ("resident_bytes", resident_bytes),
            ("num_workers", num_workers),
        ):
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}: use 0 for none.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be a share in [0, 1), got {val_fraction}: use 0.1 for a tenth.")
        if seed is not None and seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}: choose another, such as 0.")
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_train_samples = max_train_samples
        self.noise = noise
        self.val_fraction = val_fraction
        self.crop_padding = crop_padding
        self.flip = flip
        self.track_test = track_test
        self.resident_bytes = resident_bytes
        self.num_workers = num_workers
        self.seed = torch.initial_seed() if seed is None else seed
        self._seed_is_given = seed is not None
        self._sources: dict[str, Source] = {}
        self._splits: dict[SplitName, _Split] = {}
        self._train_loader: IndexLoader | None = None

    # What a data set has to give -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes; known as soon as the object exists."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels; known as soon as the object exists."""

    @abstractmethod
    def load_train(self) -> Source:
        """The whole original training set. Called once; must not decode images that nobody asks for."""

    @abstractmethod
    def load_test(self) -> Source:
        """The whole test set, whose labels are taken to be right. Called once."""

    @property
    def curated(self) -> bool:
        """Whether the labels of `load_train` are known to be right. Where not, nothing is called a true label."""
        return True

    @property
    def class_names(self) -> list[str]:
        """C names, in the order of the class indices."""
        return [str(c) for c in range(self.num_classes)]

    # What is known about the labels --------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Training samples, after the subset and without the validation split."""
        return len(self._labelled("train").labels)

    @property
    def labels(self) -> Tensor:
        """The given, noisy labels of the training split, shape (N,), int64, on the CPU."""
        return self._labelled("train").labels

    @property
    def true_labels(self) -> Tensor | None:
        """The right labels of the training split, shape (N,), int64; None where nobody knows them.

        They are known for curated sets, and where the noise was injected here.
        """
        return self._labelled("train").true_labels

    @property
    def noise_kind(self) -> str:
        """The kind of noise asked for, such as ``symmetric``; ``none`` without."""
        return self.noise.kind

    @property
    def noise_rate(self) -> float | None:
        """The rate of noise asked for, in [0, 1]; None where none is injected or labels come from a file."""
        return None if self.noise.kind in ("none", "file") else self.noise.rate

    @property
    def measured_noise_rate(self) -> float | None:
        """Share of the training split whose given label is not the true one, in [0, 1]; None if that is not known."""
        split = self._labelled("train")
        if split.true_labels is None:
            return None
        return (split.labels != split.true_labels).double().mean().item()

    @property
    def eval_names(self) -> list[str]:
        """What the loaders of `val_dataloader` are, in their order: ``val`` if one is held out, ``test`` if tracked."""
        return (["val"] if self.val_fraction > 0 else []) + (["test"] if self.track_test else [])

    def save_labels(self, path: str | Path) -> None:
        """Writes the labels of the training split to a ``.npz`` file; all of it or nothing, also when interrupted.

        The arrays are ``labels`` (N,), ``index`` (N,) (position in the original training set), ``true_labels`` (N,)
        where known, ``class_names`` (C,), and the scalars ``noise_kind``, ``noise_rate`` (nan where there is none) and
        ``seed``. With neither subset nor validation split, ``Noise(kind="file", path=..., key="labels")`` reads them
        back. With several processes, call it in one of them.

        Args:
            path: must end in ``.npz``; missing folders are made.

        Raises:
            ValueError: the name does not end in ``.npz``.
            OSError: the file cannot be written; what was there before is untouched.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"The label file must end in .npz, got {str(path)!r}: rename it.")
        split = self._labelled("train")
        arrays: dict[str, Any] = {
            "labels": split.labels.numpy(),
            "index": split.origin.numpy(),
            "class_names": np.array(self.class_names, dtype=np.str_),
            "noise_kind": np.array(self.noise_kind),
            "noise_rate": np.array(np.nan if self.noise_rate is None else self.noise_rate),
            "seed": np.array(self.seed if self.noise.seed is None else self.noise.seed, dtype=np.uint64),
        }
        if split.true_labels is not None:
            arrays["true_labels"] = split.true_labels.numpy()
        with write_whole(path) as file:
            np.savez_compressed(file, **arrays)

    # Splits --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs; may be called again.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or None for everything.
        """
        self._share_seed()
        names: list[SplitName] = []
        if stage in (None, "fit"):
            names.append("train")
        if stage in (None, "fit", "validate"):
            names.extend(cast(list[SplitName], self.eval_names))
        if stage in (None, "test", "predict"):
            names.append("test")
        for name in names:
            self._split(name)

    def teardown(self, stage: str) -> None:
        """Frees the memory on the device; everything is put back when it is needed."""
        for split in self._splits.values():
            split.on_device.clear()

    def state_dict(self) -> dict[str, Any]:
        """The seed, and a check sum of the training labels, so that a resumed run has the same labels."""
        return {"seed": self.seed, "labels": self._check_sum() if "train" in self._splits else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the seed of the run that is resumed, and compares the labels.

        Raises:
            ValueError: training is resumed on other labels than it was begun with, or another seed was given: the order
                of the samples depends on it.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # a trained model may be tested on whatever data
        if state_dict["seed"] != self.seed:
            if self._seed_is_given:
                raise ValueError(
                    f"The seed of the data must be that of the run that is resumed, {state_dict['seed']}, got {self.seed}: "
                    "give the same, or none."
                )
            self._restart_from_seed(state_dict["seed"])
        if state_dict["labels"] not in (None, self._check_sum()):
            raise ValueError(
                "The training labels must be those of the run that is resumed, but they differ: give the data module "
                f"the same data, noise, subset and split, and seed {state_dict['seed']}."
            )

    def _check_sum(self) -> int:
        split = self._labelled("train")
        return zlib.crc32(torch.stack([split.labels, split.origin]).numpy().tobytes())

    def _share_seed(self) -> None:
        """Without ``seed_everything`` every process would have labels and an order of its own."""
        if self.trainer is not None and self.trainer.world_size > 1 and not self._seed_is_given:
            seed = self.trainer.strategy.broadcast(self.seed)
            if seed != self.seed:
                self._restart_from_seed(seed)

    def _restart_from_seed(self, seed: int) -> None:
        """Everything that was loaded is loaded again: sources may depend on the seed, and labels and splits do."""
        self.seed = seed
        ready = [name for name, split in self._splits.items() if split.images is not None or split.dataset is not None]
        self._sources.clear()
        self._splits.clear()
        for name in ready:
            self._split(name)

    def _source(self, name: Literal["train", "test"]) -> Source:
        if name not in self._sources:
            source = self.load_train() if name == "train" else self.load_test()
            labels, images = source
            what = "training" if name == "train" else "test"
            if labels.dim() != 1 or labels.dtype != torch.int64 or len(labels) == 0 or len(images) != len(labels):
                raise ValueError(
                    f"The {what} set must have int64 labels of shape (N,) for its {len(images)} images, got shape "
                    f"{tuple(labels.shape)} and type {labels.dtype}: give one label per image."
                )
            if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
                raise ValueError(
                    f"The labels of the {what} set must lie in 0 to {self.num_classes - 1}, got {int(labels.min())} to "
                    f"{int(labels.max())}: number the classes from 0 and check num_classes."
                )
            if isinstance(images, Tensor) and (
                images.dtype != torch.uint8 or images.shape[1:] != (3, *self.image_size)
            ):
                raise ValueError(
                    f"The images of the {what} set must be uint8 of shape (N, 3, {self.image_size[0]}, "
                    f"{self.image_size[1]}), got shape {tuple(images.shape)} and type {images.dtype}: convert them."
                )
            self._sources[name] = source
        return self._sources[name]

    def _labelled(self, name: SplitName) -> _Split:
        """A split with its labels; its images may still be missing."""
        if name not in self._splits:
            if name == "test":
                labels = self._source("test").labels
                self._splits["test"] = _Split(labels, None, torch.arange(len(labels)))
            else:
                self._label_training_set()
        return self._splits[name]

    def _label_training_set(self) -> None:
        source = self._source("train")
        kept = self._subset(source.labels)
        if self.noise.kind == "file":  # a file is about the whole original set
            given = self.noise.apply(source.labels, self.num_classes, self.seed)[kept]
        else:
            given = self.noise.apply(source.labels[kept], self.num_classes, self.seed)
        injected = self.noise.kind not in ("none", "file")
        true = source.labels[kept] if self.curated or injected else None
        order = torch.randperm(len(kept), generator=seeded_generator(self.seed, 2))
        held_out = round(self.val_fraction * len(kept))
        if self.val_fraction > 0 and not 0 < held_out < len(kept):
            raise ValueError(
                f"A val_fraction of {self.val_fraction} leaves {held_out} samples for validation and "
                f"{len(kept) - held_out} for training out of {len(kept)}; each needs 1 or more: change the fraction."
            )
        # Sorted, so that without a validation split index i is image i of the data set.
        rows: dict[SplitName, Tensor] = {"train": order[held_out:].sort().values}
        if held_out:
            rows["val"] = order[:held_out].sort().values
        for name, row in rows.items():
            self._splits[name] = _Split(given[row], None if true is None else true[row], kept[row])

    def _subset(self, labels: Tensor) -> Tensor:
        """Positions of the training samples that are used, sorted: as many of each class as there are, or as others."""
        size = self.max_train_samples
        if size is None:
            return torch.arange(len(labels))
        if not self.num_classes <= size <= len(labels):
            raise ValueError(
                f"max_train_samples must lie between the number of classes, {self.num_classes}, and the size of the "
                f"training set, {len(labels)}, got {size}: choose one in between, or none for the whole set."
            )
        order = torch.randperm(len(labels), generator=seeded_generator(self.seed, 1))
        # Number the samples of each class in random order, and take all the firsts, all the seconds, and so on.
        by_class = order[labels[order].argsort(stable=True)]
        counts = labels.bincount(minlength=self.num_classes)
        number = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
        rank = torch.empty_like(number)
        rank[by_class] = number
        return order[rank[order].argsort(stable=True)[:size]].sort().values

    def _split(self, name: SplitName) -> _Split:
        """A split that is ready to be served."""
        if name == "val" and self.val_fraction == 0:
            raise ValueError("A validation split was asked for, but val_fraction is 0: set val_fraction, such as 0.1.")
        split = self._labelled(name)
        if split.images is None and split.dataset is None:
            images = self._source("test" if name == "test" else "train").images
            height, width = self.image_size
            everything = len(split.origin) == len(images)
            if len(split.origin) * 3 * height * width > self.resident_bytes:
                split.dataset = _Rows(images, split.origin.tolist())
            elif isinstance(images, Tensor):
                split.images = images if everything else images[split.origin]
            else:
                split.images = self._decode(_Rows(images, split.origin.tolist()))
        return split

    def _decode(self, dataset: _Rows) -> Tensor:
        images = torch.empty((len(dataset), 3, *self.image_size), dtype=torch.uint8)
        # The generator keeps the loader from drawing a number from the global stream.
        loader = DataLoader(dataset, 64, num_workers=self.num_workers, generator=torch.Generator().manual_seed(0))
        for place, decoded in zip(torch.split(images, 64), loader, strict=True):
            place.copy_(decoded)
        return images

    # Loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        """Shuffled index batches of the training split, this process's share."""
        fixed_order = getattr(self.trainer, "overfit_batches", 0) > 0
        self._train_loader = self._loader("train", self.batch_size, shuffle=True, fixed_order=fixed_order)
        return self._train_loader

    def val_dataloader(self) -> list[IndexLoader]:
        """One loader per name in `eval_names`; an empty list if there is none."""
        return [self._loader(cast(SplitName, name), self.eval_batch_size) for name in self.eval_names]

    def test_dataloader(self) -> IndexLoader:
        """The test set, in order, this process's share."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> IndexLoader:
        """The test set, in order, this process's share."""
        return self._loader("test", self.eval_batch_size)

    def _loader(
        self, name: SplitName, batch_size: int, *, shuffle: bool = False, fixed_order: bool = False
    ) -> IndexLoader:
        split = self._split(name)
        return IndexLoader(
            len(split.labels),
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
            dataset=split.dataset,
            num_workers=self.num_workers,
            fixed_order=fixed_order,
        )

    # Batches -------------------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> NoisyBatch:
        """Turns what a loader served, now on the device, into images and labels."""
        assert self.trainer is not None  # only a trainer calls this hook
        split = self._current_split(dataloader_idx)
        index, images = (batch, None) if isinstance(batch, Tensor) else batch
        generator = self._augmentation() if split == "train" else None
        looked_up = self.batch(split, index, images, generator)
        # Pure 16- or 64-bit training converts batches before this hook, when there were no images yet.
        return cast(NoisyBatch, self.trainer.precision_plugin.convert_input(looked_up))

    def batch(
        self,
        split: SplitName,
        index: Tensor,
        images: Tensor | None = None,
        generator: torch.Generator | None = None,
        policy: str = "weak",
    ) -> NoisyBatch:
        """A batch, on the device of the index.

        Args:
            split: ``train``, ``val`` or ``test``.
            index: positions in the split, shape (B,), int64.
            images: shape (B, 3, H, W), uint8, as a loader of a split that streams serves them; without them a resident
                split is looked up, and any other decoded in this process, which is slow.
            generator: the view is drawn from it; no augmentation is made without.
            policy: which view, a name in `sanm_lightning.data.policies.POLICIES`: ``weak`` (crop and flip as this data
                module has them), ``none``, ``auto_augment``, ``rand_augment``, ``jitter_affine``, ``simclr``.

        Returns:
            Images in [0, 1], float32, with the given labels; true labels for training and validation where known. The
            labels of the test set are true ones, and given as labels.

        Raises:
            ValueError: an unknown split or policy.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f"The split must be 'train', 'val' or 'test', got {split!r}: choose one of them.")
        resident = self._resident(split, index.device)
        if images is None:
            if resident.images is not None:
                images = resident.images.index_select(0, index)
            else:
                dataset = cast(ImageDataset, self._splits[split].dataset)
                images = torch.stack([dataset[row] for row in index.tolist()]).to(index.device)
        if generator is not None:  # while they are bytes: a quarter of the traffic
            images = augment(images, policy, generator, self.crop_padding, self.flip)
        true_labels = None if resident.true_labels is None else resident.true_labels[index]
        return NoisyBatch(images.to(torch.float32).div_(255), resident.labels[index], index, true_labels)

    def _current_split(self, dataloader_idx: int) -> SplitName:
        assert self.trainer is not None
        if self.trainer.training:
            return "train"
        if self.trainer.sanity_checking or self.trainer.validating:
            return cast(SplitName, self.eval_names[dataloader_idx])
        return "test"

    def _augmentation(self) -> torch.Generator:
        """The stream of the batch that was served last. On the CPU, so that all devices get the same views."""
        assert self._train_loader is not None
        epoch, number = self._train_loader.position
        return seeded_generator(self.seed, 3, self._train_loader.rank, epoch, number)

    def _resident(self, name: SplitName, device: torch.device) -> _Resident:
        split = self._split(name)
        if device not in split.on_device:
            parts: Sequence[Tensor | None] = (split.labels, split.true_labels, split.images)
            moved = [None if part is None else part.to(device) for part in parts]
            split.on_device[device] = _Resident(cast(Tensor, moved[0]), moved[1], moved[2])
        return split.on_device[device]
