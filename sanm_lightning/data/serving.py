"""Convert the output of loaders to batches, with the views of the module in training."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.data.image_store import ImageStore, Row, RowRequest, Transform
from sanm_lightning.data.label_table import LabelTable
from sanm_lightning.data.loader import IndexLoader
from sanm_lightning.data.policies import POLICIES, augment, center_crop, takes_batches
from sanm_lightning.data.views import select_rows
from sanm_lightning.random_streams import named_generator

__all__ = ["ServedBatches"]

SplitName = Literal["train", "val", "test"]


class ServedBatches(L.LightningDataModule):
    """The part of `NoisyDataModule` between a loader and the model: rows, views, labels."""

    seed: int
    batch_size: int
    crop_padding: int
    flip: bool
    policies: dict[str, Callable[..., Any]]
    _train_loader: IndexLoader | None
    _labels_on_device: dict[tuple[str, torch.device], tuple[Tensor, Tensor | None]]

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels; available after construction."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of training samples."""

    @property
    @abstractmethod
    def eval_names(self) -> list[str]:
        """Names of the validation loaders, in order."""

    @property
    @abstractmethod
    def test_names(self) -> list[str]:
        """Names of the test loaders, in order."""

    @abstractmethod
    def epoch_pool(self, epoch: int, peer: int = 0) -> Tensor:
        """Return the positions that an epoch samples from, (M,)."""

    @abstractmethod
    def table(self, split: str) -> LabelTable:
        """Return the labels of a split."""

    @abstractmethod
    def store(self, split: str) -> ImageStore:
        """Return the images of a split."""

    # Samples and views of the module in training
    # ------------------------------------------------------------------------

    def _choose(self, epoch: int) -> Tensor | None:
        """Prepare the epoch of the module and return its batches."""
        module: Any = cast(Any, self.trainer).lightning_module
        loader = cast(IndexLoader, self._train_loader)
        module.prepare_epoch()
        plan = EpochPlan(
            epoch, len(loader), self.batch_size, self.num_samples, loader.rank, loader.world_size,
            lambda peer: self.epoch_pool(epoch, peer),
        )  # fmt: skip
        chosen: Tensor | None = module.epoch_batches(plan)
        if chosen is not None and chosen.numel() and int(chosen.max()) >= self.num_samples:
            raise ValueError(
                f"expected positions in [0, {self.num_samples}) in the batches of an epoch, got {int(chosen.max())}"
            )
        return chosen

    def _views(self) -> tuple[View, ...]:
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        views = getattr(module, "views", None)
        return tuple(views()) if callable(views) and hasattr(module, "epoch_batches") else ("weak",)

    def _policy(self, name: str) -> Callable[..., Any]:
        if name not in self.policies and name not in POLICIES:
            known = ", ".join([*POLICIES, *self.policies])
            raise ValueError(f"expected a view among {known}, got {name!r}; choose one, or add it to data.policies")
        return self.policies.get(name) or POLICIES[name]

    def _takes_batches(self, name: str) -> bool:
        """Return whether a policy takes batches; those of this package do, which spares a look at the signature."""
        return (name in POLICIES and name not in self.policies) or takes_batches(self._policy(name))

    def _transforms(self) -> tuple[tuple[Transform | None, ...], ...]:
        """Return, for each view, the transforms of its blocks; None for policies applied on the device."""
        found = []
        for view in self._views():
            policies = [self._policy(name) for name in ((view,) if isinstance(view, str) else view)]
            found.append(tuple(None if takes_batches(policy) else policy for policy in policies))
        return tuple(found)

    def _request(self, epoch: int, step: int, index: Tensor) -> RowRequest:
        rank = 0 if self._train_loader is None else self._train_loader.rank
        return RowRequest(index, self._transforms(), (self.seed, rank, epoch, step))

    # Batches -------------------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> NoisyBatch:
        """Convert the output of a loader, on the device, to images and labels."""
        assert self.trainer is not None  # this hook is called by a trainer only
        split = self._current_split(dataloader_idx)
        made = self._training_batch(batch) if split == "train" else self.pass_batch(batch, split)
        # Pure 16- or 64-bit training converts batches before this hook, when the batch contains no images yet.
        return cast(NoisyBatch, self.trainer.precision_plugin.convert_input(made))

    def _training_batch(self, item: Tensor | Row) -> NoisyBatch:
        loader = cast(IndexLoader, self._train_loader)
        epoch, step = loader.position
        index, images, ready = self._images(item, "train")
        views = []
        for number, view in enumerate(self._views()):
            names = (view,) if isinstance(view, str) else view
            made = iter(
                ready[number].split(len(index) // len(names)) if len(ready) > number and len(ready[number]) else ()
            )
            generator = named_generator("augment", self.seed, loader.rank, epoch, step, number)
            blocks = [
                self._augmented(block, name, generator) if self._takes_batches(name) else next(made)
                for block, name in zip(images.split(len(images) // len(names)), names, strict=True)
            ]
            views.append(_unit(blocks[0] if len(blocks) == 1 else torch.cat(blocks)))
        labels, true_labels = self._labels("train", index)
        return NoisyBatch(views[0], labels, index, true_labels, tuple(views))

    def pass_batch(
        self,
        item: Tensor | Row,
        split: str,
        device: torch.device | None = None,
        policy: str = "none",
        generator: torch.Generator | None = None,
    ) -> NoisyBatch:
        """Convert the output of a loader to a batch with one view, not augmented by default.

        Args:
            item: output of `pass_dataloader` or another loader, on the device.
            split: ``train``, ``val`` or ``test``.
            device: device of the batch; None uses that of the item.
            policy: name of the view; transforms of one image are not supported.
            generator: random generator of the view.

        Returns:
            The batch.
        """
        index, images, _ = self._images(item, split)
        if device is not None:
            index, images = index.to(device), images.to(device)
        viewed = self._augmented(images, policy, generator)
        labels, true_labels = self._labels(split, index)
        return NoisyBatch(_unit(viewed), labels, index, true_labels)

    def batch(
        self,
        split: SplitName,
        index: Tensor,
        images: Tensor | None = None,
        generator: torch.Generator | None = None,
        policy: str = "weak",
    ) -> NoisyBatch:
        """Return samples by position, without a loader; images of streamed sets are decoded in this process.

        Args:
            split: ``train``, ``val`` or ``test``.
            index: positions in the split, shape (B,), int64.
            images: decoded images, shape (B, 3, H, W), uint8; None looks them up.
            generator: random generator of the view; None disables augmentation.
            policy: name of the view, see `policies`.

        Returns:
            Images in [0, 1], float32, with the given labels, on the device of the index; true labels for training and
            validation if known. The labels of the test set are assumed correct and returned as labels.

        Raises:
            ValueError: if the split or policy is unknown.
        """
        if split not in ("train", "val", "test"):
            raise ValueError(f"expected the split 'train', 'val' or 'test', got {split!r}; choose one of them")
        images = self.store(split).look_up(index) if images is None else images
        viewed = self._augmented(images, "none" if generator is None else policy, generator)
        labels, true_labels = self._labels(split, index)
        return NoisyBatch(_unit(viewed), labels, index, true_labels)

    def _augmented(self, images: Tensor, name: str, generator: torch.Generator | None) -> Tensor:
        """Return a view of bytes (B, 3, H, W), augmented and cropped to the image size, as bytes."""
        if name == "none" and name not in self.policies:
            return center_crop(images, self.image_size)
        policy = self.policies.get(name)
        if policy is None:
            return augment(
                images, name, cast(torch.Generator, generator), self.crop_padding, self.flip, self.image_size
            )
        if not takes_batches(policy):
            raise ValueError(
                f"expected a batch policy outside of training views, got {name!r}, a transform of one image; add a "
                "parameter 'generator' and process whole batches"
            )
        return cast(Tensor, policy(images, generator=generator))

    def _images(self, item: Tensor | Row, split: str) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return index, images of the row as bytes, and the views computed by workers."""
        if isinstance(item, Tensor):
            return item, self.store(split).look_up(item), []
        index, images, place, views = item
        whole = images if len(images) == len(place) else select_rows(images, place)
        return index, whole, views

    def _labels(self, split: str, index: Tensor) -> tuple[Tensor, Tensor | None]:
        key = (split, index.device)
        if key not in self._labels_on_device:
            table = self.table(split)
            true = None if table.true_labels is None else table.true_labels.to(index.device)
            self._labels_on_device[key] = (table.labels.to(index.device), true)
        labels, true_labels = self._labels_on_device[key]
        return labels[index], None if true_labels is None else true_labels[index]

    def _current_split(self, dataloader_idx: int) -> str:
        assert self.trainer is not None
        if self.trainer.training:
            return "train"
        if self.trainer.sanity_checking or self.trainer.validating:
            return self.eval_names[dataloader_idx]
        return self.test_names[dataloader_idx]


def _unit(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255)
