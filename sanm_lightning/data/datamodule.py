"""The data module that all data sets share: splits, loaders, and augmentation on the device."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.data.checks import check_arguments
from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.label_table import LabelTable, label_tables, save_label_table
from sanm_lightning.data.loader import IndexLoader
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.source import Source, check_source
from sanm_lightning.data.splits import Splits

__all__ = ["NoisyDataModule", "Source"]

NO_NOISE = Noise()


class NoisyDataModule(Splits):
    """Images with labels that may be wrong: the base of all data sets here, and of your own.

    A subclass gives `num_classes` and `image_size`, and `load_train` and `load_test`, each a `Source`; if need be
    `prepare_data` for a download and `class_names`. From there on everything is shared: a class-balanced subset, label
    noise, a validation split, loaders that resume in mid-epoch, and random crops and flips on the device.

    Loaders serve indices. Images that fit in ``resident_bytes`` are decoded once, lie on the device as uint8, and are
    looked up there; larger sets are decoded by worker processes as they are needed, each distinct sample of a batch once,
    whatever the number of its views. Either way a batch reaches the model as a `sanm_lightning.batch.NoisyBatch` with
    images in [0, 1]. Its ``index`` is the position in the split it comes from, for training 0 to ``num_samples`` - 1. The
    augmentation of a batch is a function of the seed, the epoch, the number of the batch and the process, so that a
    resumed run continues exactly.

    A module in training may choose the samples of an epoch (``epoch_batches``) and the views of its batches (``views``), as
    the methods of this package do; for any other module, batches are shuffled and have one view, ``weak``.

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
        policies: augmentation policies by name, beside or in place of those of this package. A callable with a parameter
            ``generator`` gets all images of a batch, uint8 (B, 3, H, W), on their device; any other callable is a transform
            of one image, uint8 (3, H, W), in torchvision's way, and runs in the workers.
        mean: channel means of the training images, in [0, 1]: a fact of the data, for a network that is not told otherwise.
        std: channel standard deviations, likewise.
        holdout_fraction: fraction of the training samples, in [0, 1), held out as ``val`` where the data have neither a test
            nor a validation split and ``val_fraction`` is 0. Their labels are as noisy as the training labels.
        seed: of subset, noise, split, order and augmentation; by default torch's initial seed (``seed_everything``).

    Raises:
        ValueError: an argument is out of range.
    """

    mean: tuple[float, float, float] | None = None
    """Channel means of the training images, in [0, 1]; None where they are not known."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations, likewise."""

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
        policies: dict[str, Callable] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        holdout_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        check_arguments(
            {"batch_size": batch_size, "eval_batch_size": eval_batch_size},
            {"crop_padding": crop_padding, "resident_bytes": resident_bytes, "num_workers": num_workers},
            {"val_fraction": val_fraction, "holdout_fraction": holdout_fraction},
            seed,
        )
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_train_samples = max_train_samples
        self.noise = noise
        self.val_fraction = val_fraction
        self.holdout_fraction = holdout_fraction
        self.crop_padding = crop_padding
        self.flip = flip
        self.track_test = track_test
        self.resident_bytes = resident_bytes
        self.num_workers = num_workers
        self.seed = torch.initial_seed() if seed is None else seed
        self._seed_is_given = seed is not None
        self.policies: dict[str, Callable[..., Any]] = dict(policies or {})
        if mean is not None:  # or what the class knows
            self.mean = mean
        if std is not None:
            self.std = std
        self._sources: dict[str, Source] = {}
        self._tables: dict[str, LabelTable] = {}
        self._stores: dict[str, ImageStore] = {}
        self._labels_on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]] = {}
        self._train_loader: IndexLoader | None = None
        self._said: set[str] = set()

    # What a data set has to give -----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes; known as soon as the object exists."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels; known as soon as the object exists."""

    @property
    def decode_size(self) -> tuple[int, int]:
        """(H, W) of a decoded image in pixels, at least ``image_size``; larger ones are cropped to that in every view."""
        return self.image_size

    def epoch_pool(self, epoch: int, peer: int = 0) -> Tensor:
        """Choose the positions that an epoch draws from, (M,), the same in every process; by default all.

        A data set that draws a balanced subset anew for each epoch returns that, of the same size in every epoch. Methods draw
        their samples from it, and passes over the training set walk it.

        Args:
            epoch: counted from 0.
            peer: network 0 or 1 that the samples are for.
        """
        return torch.arange(self.num_samples)

    @abstractmethod
    def load_train(self) -> Source:
        """The whole original training set. Called once; must not decode images before they are used."""

    @abstractmethod
    def load_test(self) -> Source:
        """The whole test set, whose labels are taken to be right. Called once."""

    def load_val(self) -> Source:
        """The whole validation set, where `own_splits` names one; its labels may be wrong. Called once."""
        raise NotImplementedError(f"{type(self).__name__} has no validation set; write load_val")

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
        return len(self.table("train").labels)

    @property
    def labels(self) -> Tensor:
        """The given, noisy labels of the training split, shape (N,), int64, on the CPU."""
        return self.table("train").labels

    @property
    def true_labels(self) -> Tensor | None:
        """The right labels of the training split, shape (N,), int64; None where they are not known.

        They are known for curated sets, and where the noise was injected here.
        """
        return self.table("train").true_labels

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
        return self.table("train").noise_rate

    def save_labels(self, path: str | Path) -> None:
        """Writes the labels of the training split to a ``.npz`` file; all of it or nothing, also when interrupted.

        The arrays are ``labels`` (N,), ``index`` (N,) (position in the original training set), ``paths`` (N,) and
        ``true_labels`` (N,) where known, ``class_names`` (C,), and the scalars ``noise_kind``, ``noise_rate`` (nan where there
        is none) and ``seed``. With neither subset nor validation split, ``Noise(kind="file", path=..., key="labels")`` reads
        them back. With several processes, call it in one of them.

        Args:
            path: must end in ``.npz``; missing folders are made.

        Raises:
            ValueError: the name does not end in ``.npz``.
            OSError: the file cannot be written; what was there before is untouched.
        """
        noise_seed = self.seed if self.noise.seed is None else self.noise.seed
        save_label_table(
            path,
            self.table("train"),
            self.class_names,
            self.noise_kind,
            self.noise_rate,
            noise_seed,
            self.sample_paths(),
        )

    # Splits --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Loads what the stage needs; may be called again.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict``, or None for everything.
        """
        self._share_seed()
        names: list[str] = []
        if stage in (None, "fit"):
            names.append("train")
        if stage in (None, "fit", "validate"):
            names.extend(self.eval_names)
        if stage in (None, "test", "predict"):
            names.extend(self.test_names)
        for name in names:
            self.store(name)

    def teardown(self, stage: str) -> None:
        """Frees the memory on the device; everything is put back when it is needed."""
        self._labels_on_device.clear()
        for store in self._stores.values():
            store.free()

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            load = {"train": self.load_train, "val": self.load_val, "test": self.load_test}[name]
            source = load()
            what = {"train": "training", "val": "validation", "test": "test"}[name]
            check_source(source, self.num_classes, self.decode_size, what)
            self._sources[name] = source
        return self._sources[name]

    def table(self, split: str) -> LabelTable:
        """Return the labels of ``train``, ``val`` or ``test``; of ``test`` they are taken to be right."""
        if split == "val" and "val" not in self.eval_names:
            raise ValueError("expected a val_fraction above 0 for a validation split, got 0; set it, such as to 0.1")
        if split == "test" and "test" not in self.own_splits:
            raise ValueError("expected a test split in the data, got none; use the split 'val'")
        if split in self._tables:
            return self._tables[split]
        if split in self.own_splits:
            labels = self._source(split).labels
            true = labels if split == "val" and self.curated else None
            self._tables[split] = LabelTable(labels, true, torch.arange(len(labels)))
            return self._tables[split]
        if self.val_fraction > 0 and "val" in self.own_splits:
            raise ValueError(
                f"expected val_fraction 0 for data with a validation split of their own, got {self.val_fraction}; leave it out"
            )
        source = self._source("train")
        others: list[str] = []
        if self.noise.kind == "file" and source.paths is not None:  # a file may hold rows of the other splits, too
            others = [path for name in self.own_splits for path in self._source(name).paths or []]
        file = self.noise.read(source.labels, self.class_names, source.paths, others)
        self._tables |= label_tables(
            source.labels, self.num_classes, self.seed, self.noise, self.max_train_samples, self.held_out_fraction,
            self.curated, lambda kept: torch.stack([source.images[i] for i in kept.tolist()]),
            file, least=int(self._holds_out),
        )  # fmt: skip
        if file is not None and not file.kept.all():
            dropped = int((~file.kept).sum())
            self._say(f"{dropped} of {len(file.kept)} training samples dropped, as {self.noise.path} says")
        if self._holds_out:
            self._say(
                f"no test split: {len(self._tables['val'].labels)} training samples are held out for evaluation as 'val'; the "
                "labels of this hold-out are as noisy as the training labels"
            )
        return self._tables[split]

    def sample_paths(self, split: str = "train") -> list[str] | None:
        """Return the file of each sample of a split, relative to the root, with ``/``; None where there are no files."""
        table, paths = self.table(split), self._source(split if split in self.own_splits else "train").paths
        return None if paths is None else [paths[row] for row in table.origin.tolist()]

    def source_images(self, split: str = "train") -> Any:
        """Return the images that the rows of ``table(split).origin`` count, uint8 (3, H, W) each; decoded when asked for."""
        return self._source(split if split in self.own_splits else "train").images

    def _say(self, line: str) -> None:
        """Log a line once, in one process."""
        if line not in self._said:
            self._said.add(line)
            rank_zero_info(line)

    def store(self, split: str) -> ImageStore:
        """Return the images of ``train``, ``val`` or ``test``."""
        if split not in self._stores:
            table, images = self.table(split), self.source_images(split)
            self._stores[split] = ImageStore(
                images, table.origin, self.decode_size, self.resident_bytes, self.num_workers
            )
        return self._stores[split]

    def split_size(self, split: str) -> int:
        """Return the number of samples of a split."""
        return len(self.table(split).labels)

    # Loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        """Batches of the training split, this process's share; chosen by the module where it does so."""
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        loader = self._loader(
            "train", self.batch_size, shuffle=True, pool=self.epoch_pool,
            fixed_order=getattr(self.trainer, "overfit_batches", 0) > 0,
            choose=self._choose if hasattr(module, "epoch_batches") else None,
        )  # fmt: skip
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> list[IndexLoader]:
        """One loader per name in `eval_names`; an empty list if there is none."""
        return [self._loader(name, self.eval_batch_size) for name in self.eval_names]

    def test_dataloader(self) -> IndexLoader | list[IndexLoader]:
        """One loader per name in `test_names`, in order, this process's share."""
        if not self.test_names:
            raise ValueError(
                "expected a test or a validation split, got neither; give one, or a holdout_fraction above 0"
            )
        loaders = [self._loader(name, self.eval_batch_size) for name in self.test_names]
        return loaders[0] if len(loaders) == 1 else loaders

    def predict_dataloader(self) -> IndexLoader | list[IndexLoader]:
        """The same as `test_dataloader`."""
        return self.test_dataloader()

    def pass_dataloader(self, split: str = "train") -> IndexLoader:
        """Every sample of a split once over all processes, in order; of the training split those of the epoch's pool."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        pool = (lambda _: self.epoch_pool(epoch)) if split == "train" else None
        return self._loader(split, self.eval_batch_size, pool=pool)

    def _loader(
        self, split: str, batch_size: int, pool: Callable[[int], Tensor] | None = None, **options: Any
    ) -> IndexLoader:
        store = self.store(split)
        training = bool(options.get("shuffle"))
        return IndexLoader(
            self.split_size(split) if pool is None else len(pool(0)),
            batch_size,
            shuffle=options.pop("shuffle", False),
            seed=self.seed,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
            store=store if store.resident is None or training else None,
            decode=lambda: store.resident is None or any(map(any, self._transforms())),
            pool=pool,
            request=self._request if split == "train" and pool == self.epoch_pool else None,
            **options,
        )
