"""Base data module of all data sets: splits, loaders, and augmentation on the device."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sanm_lightning.data.checks import check_arguments
from sanm_lightning.data.epoch_pools import EpochPools
from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.instance_noise import Pixels
from sanm_lightning.data.label_table import LabelTable, label_tables, save_label_table
from sanm_lightning.data.loader import IndexLoader
from sanm_lightning.data.noise import Noise
from sanm_lightning.data.source import Source, check_source

__all__ = ["NoisyDataModule", "Source"]

NO_NOISE = Noise()


class NoisyDataModule(EpochPools):
    """Base class of data sets with noisy labels.

    A subclass defines `num_classes` and `image_size`, `load_train` and `load_test`, which return a `Source`, and
    optionally `prepare_data` for a download and `class_names`. The base class provides class-balanced subsets, label
    noise, a validation split, loaders that resume in mid-epoch, and random crops and flips on the device.

    Loaders return the positions of samples, which this class converts to batches; batches of other loaders of a subclass
    reach the model unchanged. Images that fit in ``resident_bytes`` are decoded once, stored on the device as uint8, and
    indexed there; larger sets are streamed, that is, decoded by worker processes, each distinct sample of a batch once
    for all views. The model receives a `sanm_lightning.batch.NoisyBatch` with images in [0, 1]. Its ``index`` is the
    position in the split, 0 to ``num_samples`` - 1 for training. The augmentation of a batch is a function of seed,
    epoch, batch number and process, so resumed runs continue exactly.

    The module in training may choose the samples of an epoch (``epoch_batches``) and the views of its batches
    (``views``), as the methods of this package do; for other modules, batches are shuffled and have one view, ``weak``.

    Args:
        root: folder of the data.
        batch_size: training samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        drop_last: whether to drop the last partial batch of a training epoch.
        max_train_samples: size of a random, class-balanced training subset. Default: all samples.
        noise: noise of the training labels. Default: none.
        val_fraction: fraction of the training samples, in [0, 1), held out for validation with their noisy labels.
        crop_padding: pixels of zero padding for random crops in training; 0 disables crops.
        flip: whether to flip training images horizontally at random.
        track_test: evaluate the test set after every training epoch, for the commonly reported best accuracy. For
            tracking only: a model selected by this accuracy is selected on the test set.
        resident_bytes: splits whose images take more bytes are streamed by workers.
        num_workers: number of worker processes that decode images.
        policies: augmentation policies by name, which extend or override those of this package. A callable with a
            parameter ``generator`` receives all images of a batch, uint8 (B, C, H, W), on their device; any other
            callable is a torchvision-style transform of one image, uint8 (C, H, W), and runs in the workers.
        mean: channel means of the training images, in [0, 1], used by networks without configured statistics.
        std: channel standard deviations of the training images, used likewise.
        holdout_fraction: fraction of the training samples, in [0, 1), held out as ``val`` if the data have neither a
            test nor a validation split and ``val_fraction`` is 0. Their labels are as noisy as the training labels.
        samples_per_epoch: size of the subset of the training split that an epoch uses, sampled anew in every epoch, and
            separately for each network of a method that selects its samples. Default: all samples.
        balanced: whether the subset has equal class sizes; without ``samples_per_epoch``, C times the smallest class.
        seed: seed of subset, noise, split, order and augmentation. Default: torch's initial seed (``seed_everything``).

    Raises:
        TypeError: if ``noise`` is not a `Noise`.
        ValueError: if an argument is out of range.
    """

    channels: int = 3
    """Number of channels of the images, 1 to 4."""
    mean: tuple[float, ...] | None = None
    """Channel means of the training images, in [0, 1]; None if unknown."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of the training images; None if unknown."""
    top_k: int | None = None
    """Evaluations also log the fraction of labels among the k most probable classes; None disables it."""

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
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        holdout_fraction: float = 0.1,
        drop_last: bool = False,
        samples_per_epoch: int | None = None,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(
            {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
            | ({} if samples_per_epoch is None else {"samples_per_epoch": samples_per_epoch}),
            {"crop_padding": crop_padding, "resident_bytes": resident_bytes, "num_workers": num_workers},
            {"val_fraction": val_fraction, "holdout_fraction": holdout_fraction},
            seed,
        )
        if not isinstance(noise, Noise):
            raise TypeError(f"expected noise of type Noise, got {noise!r}; use Noise(kind=..., rate=...)")
        self.root = root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.drop_last = drop_last
        self.max_train_samples = max_train_samples
        self.noise = noise
        self.val_fraction = val_fraction
        self.holdout_fraction = holdout_fraction
        self.samples_per_epoch = samples_per_epoch
        self.balanced = balanced
        self.crop_padding = crop_padding
        self.flip = flip
        self.track_test = track_test
        self.resident_bytes = resident_bytes
        self.num_workers = num_workers
        self.seed = torch.initial_seed() if seed is None else seed
        self._seed_is_given = seed is not None
        self.policies: dict[str, Callable[..., Any]] = dict(policies or {})
        if mean is not None:  # otherwise the class attribute
            self.mean = mean
        if std is not None:
            self.std = std
        self._sources: dict[str, Source] = {}
        self._tables: dict[str, LabelTable] = {}
        self._stores: dict[str, ImageStore] = {}
        self._labels_on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]] = {}
        self._said: set[str] = set()

    # Methods of the subclass ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """C, the number of classes; available after construction."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels; available after construction."""

    @property
    def decode_size(self) -> tuple[int, int]:
        """(H, W) of decoded images in pixels, at least ``image_size``; every view is cropped to ``image_size``."""
        return self.image_size

    @abstractmethod
    def load_train(self) -> Source:
        """Return the whole original training set. Called once; images should be decoded on access only."""

    @abstractmethod
    def load_test(self) -> Source:
        """Return the whole test set, whose labels are assumed correct. Called once."""

    # `load_` and the name of the split: data with further test sets in `own_splits` define one method for each.

    def load_val(self) -> Source:
        """Return the whole validation set, if `own_splits` includes ``val``; its labels may be wrong. Called once."""
        raise NotImplementedError(
            f"expected load_val in {type(self).__name__}, whose own_splits include 'val', got none; define it"
        )

    @property
    def curated(self) -> bool:
        """Whether the labels of `load_train` are known to be correct; otherwise ``true_labels`` is None."""
        return True

    @property
    def class_names(self) -> list[str]:
        """Class names, in the order of the class indices."""
        return [str(c) for c in range(self.num_classes)]

    # Labels --------------------------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Number of training samples, after the subset and without the validation split."""
        return len(self.table("train").labels)

    @property
    def labels(self) -> Tensor:
        """Given, noisy labels of the training split, shape (N,), int64, on the CPU."""
        return self.table("train").labels

    @property
    def true_labels(self) -> Tensor | None:
        """True labels of the training split, shape (N,), int64; None if unknown.

        They are known for curated sets, and for noise injected by this data module.
        """
        return self.table("train").true_labels

    @property
    def noise_kind(self) -> str:
        """Kind of the requested noise, such as ``symmetric`` or ``none``."""
        return self.noise.kind

    @property
    def noise_rate(self) -> float | None:
        """Requested noise rate, in [0, 1]; None without noise, with a transition matrix, or with labels from a file."""
        return self.noise.asked_rate

    @property
    def measured_noise_rate(self) -> float | None:
        """Fraction of wrong labels in the training split, in [0, 1]; None if the true labels are unknown."""
        return self.table("train").noise_rate

    def original_labels(self) -> LabelTable:
        """Return the labels of the whole original training set with this noise, without subset and validation split."""
        if "original" in self._tables:
            return self._tables["original"]
        source = self._source("train")
        file = self.noise.read(source.labels, self.class_names, source.paths, self._other_paths())
        pixels = Pixels(source.images, self.mean, self.std)
        args = source.labels, self.num_classes, self.seed, self.noise
        true = source.true_labels
        tables = label_tables(*args, curated=self.curated, images=pixels, file=file, true_labels=true)
        self._tables["original"] = tables["train"]
        return self._tables["original"]

    def save_labels(self, path: str | Path, original: bool = False) -> None:
        """Write the labels of the training split to a ``.npz`` file, atomically.

        The arrays are ``labels`` (N,), ``index`` (N,) (position in the original training set), ``paths`` (N,) and
        ``true_labels`` (N,) if known, ``class_names`` (C,), and the scalars ``noise_kind``, ``noise_rate`` (nan if
        there is none) and ``seed``; `OtherSamples.arrays` of the rest of the original set. ``Noise(kind="file", path=...,
        key="labels")`` reads the file. With several processes, call it in one of them.

        Args:
            path: output file with extension ``.npz``; missing folders are created.
            original: write `original_labels`.

        Raises:
            ValueError: if the extension is not ``.npz``.
            OSError: if the file cannot be written; a previous file is kept.
        """
        table = self.original_labels() if original else self.table("train")
        paths = self._paths_at(table.origin, "train")
        noise_seed = self.seed if self.noise.seed is None else self.noise.seed
        others = self._others_than(table.origin)
        save_label_table(path, table, self.class_names, self.noise_kind, self.noise_rate, noise_seed, paths, others)

    # Splits --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage; may be called repeatedly.

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
        """Free the memory on the device; images and labels are moved again on the next access."""
        self.served_split = None  # the trainer keeps its data module, also for other loaders
        self._labels_on_device.clear()
        for store in self._stores.values():
            store.free()

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            source = getattr(self, f"load_{name}")()
            what = {"train": "training", "val": "validation"}.get(name, name)
            check_source(source, self.num_classes, self.decode_size, what, self.channels)
            self._sources[name] = source
        return self._sources[name]

    def table(self, split: str) -> LabelTable:
        """Return the labels of ``train``, ``val`` or a test set; those of test sets are assumed correct.

        Raises:
            ValueError: if the split is unknown, or does not exist.
        """
        names = list(dict.fromkeys(("train", "val", "test", *self.own_splits)))
        if split not in names:
            listed = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
            raise ValueError(f"expected the split {listed}, got {split!r}; choose one of them")
        if split == "val" and "val" not in self.eval_names:
            raise ValueError(
                "expected a val_fraction above 0 for a validation split, got 0; set it to 0.1, for example"
            )
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
                f"expected val_fraction 0 for data with a validation split, got {self.val_fraction}; omit it"
            )
        source = self._source("train")
        file = self.noise.read(source.labels, self.class_names, source.paths, self._other_paths())
        self._tables |= label_tables(
            source.labels, self.num_classes, self.seed, self.noise, self.max_train_samples, self.held_out_fraction,
            self.curated, Pixels(source.images, self.mean, self.std), file, least=int(self._holds_out),
            true_labels=source.true_labels,
        )  # fmt: skip
        if file is not None:
            self._say(f"labels of {self.noise.path}: {file.compare(source.labels)}")
        if self._holds_out:
            self._say(
                f"no test split: {len(self._tables['val'].labels)} training samples are held out for evaluation as 'val'; "
                "their labels are as noisy as the training labels"
            )
        if self.held_out_fraction > 0 and (empty := self.classes_without(self._tables["val"].labels)):
            self._say(f"held-out split 'val': no samples of {empty}, which have too few training samples")
        return self._tables[split]

    def store(self, split: str) -> ImageStore:
        """Return the images of a split."""
        if split not in self._stores:
            table, images = self.table(split), self.source_images(split)
            self._stores[split] = ImageStore(
                images, table.origin, self.decode_size, self.resident_bytes, self.num_workers, self.channels
            )
        return self._stores[split]

    def split_size(self, split: str) -> int:
        """Return the number of samples of a split."""
        return len(self.table(split).labels)

    # Loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IndexLoader:
        """Return the loader of the training split for this process, with batches chosen by the module if it does so."""
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        loader: IndexLoader = self._loader(
            "train", self.batch_size, shuffle=True, drop_last=self.drop_last, pool=self.epoch_pool,
            fixed_order=self._fixed_order,
            choose=(lambda epoch: self._choose(epoch, len(loader))) if hasattr(module, "epoch_batches") else None,
        )  # fmt: skip
        return loader

    def val_dataloader(self) -> list[IndexLoader]:
        """Return one loader per name in `eval_names`; an empty list if there is none."""
        return [self._loader(name, self.eval_batch_size) for name in self.eval_names]

    def test_dataloader(self) -> IndexLoader | list[IndexLoader]:
        """Return one loader per name in `test_names`, in order, for this process."""
        if not self.test_names:
            raise ValueError(
                "expected a test or a validation split, got neither; add one, or set holdout_fraction above 0"
            )
        loaders = [self._loader(name, self.eval_batch_size) for name in self.test_names]
        return loaders[0] if len(loaders) == 1 else loaders

    def predict_dataloader(self) -> IndexLoader | list[IndexLoader]:
        """Return the loaders of `test_dataloader`."""
        return self.test_dataloader()

    def pass_dataloader(self, split: str = "train", positions: Tensor | None = None) -> IndexLoader:
        """Return an ordered loader of ``positions`` (M,), of `pass_pool` for ``train``, or of the whole split."""
        if positions is None and split == "train":
            positions = self.pass_pool()
        return self._loader(split, self.eval_batch_size, pool=None if positions is None else lambda _: positions)

    def _loader(
        self, split: str, batch_size: int, pool: Callable[[int], Tensor] | None = None, **options: Any
    ) -> IndexLoader:
        store = self.store(split)
        training = bool(options.get("shuffle"))
        rank, world_size = self._processes
        return IndexLoader(
            self.split_size(split) if pool is None else len(pool(0)),
            batch_size,
            shuffle=options.pop("shuffle", False),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            split=split,
            store=store if store.resident is None or training else None,
            decode=lambda: store.resident is None or any(map(any, self._worker_policies(streamed=False))),
            pool=pool,
            request=self._request if split == "train" and pool == self.epoch_pool else None,
            **options,
        )
