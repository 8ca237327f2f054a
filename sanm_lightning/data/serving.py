"""Convert the output of loaders to batches, with the views of the module in training."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sanm_lightning.batch import EpochPlan, NoisyBatch, View
from sanm_lightning.data.image_store import ImageStore
from sanm_lightning.data.label_table import LabelTable
from sanm_lightning.data.policies import POLICIES, augment, center_crop
from sanm_lightning.data.rows import Policy, Row, RowRequest, SplitItem, batch_view, takes_batches, view_generator
from sanm_lightning.data.views import select_rows

__all__ = ["ServedBatches"]


class ServedBatches(L.LightningDataModule):
    """The part of `NoisyDataModule` between a loader and the model: rows, views, labels."""

    seed: int
    batch_size: int
    crop_padding: int
    flip: bool
    policies: dict[str, Callable[..., Any]]
    served_split: str | None = None
    """Split of the last batch that the trainer passed to the model; None if it is of another loader."""
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

    @property
    def _processes(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def _fixed_order(self) -> bool:
        """Whether every epoch samples the same, as required by ``overfit_batches``."""
        return getattr(self.trainer, "overfit_batches", 0) > 0

    # Samples and views of the module in training
    # ------------------------------------------------------------------------

    def _choose(self, epoch: int, steps: int) -> Tensor | None:
        """Prepare the epoch of the module and return its batches."""
        module: Any = cast(Any, self.trainer).lightning_module
        module.prepare_epoch()
        plan = EpochPlan(
            epoch, steps, self.batch_size, self.num_samples, *self._processes,
            lambda peer: self.epoch_pool(plan.draw_epoch, peer), self._fixed_order,
        )  # fmt: skip
        chosen: Tensor | None = module.epoch_batches(plan)
        if epoch == 0 and self.policies:
            self._say_unused_policies(type(module).__name__)
        if chosen is not None and chosen.numel() and int(chosen.max()) >= self.num_samples:
            raise ValueError(
                f"expected positions in [0, {self.num_samples}) in the batches of an epoch, got {int(chosen.max())}"
            )
        return chosen

    def _views(self) -> tuple[View, ...]:
        module = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        views = getattr(module, "views", None)
        return tuple(views()) if callable(views) and hasattr(module, "epoch_batches") else ("weak",)

    def _say_unused_policies(self, method: str) -> None:
        """Log the given policies that no view of the first epoch uses, such as misspelled ones."""
        used = list(
            dict.fromkeys(name for view in self._views() for name in ((view,) if isinstance(view, str) else view))
        )
        if unused := [name for name in self.policies if name not in used]:
            rank_zero_info(
                f"views of {method} in epoch 0: {', '.join(used)}; policies without a view: {', '.join(unused)}"
            )

    def _policy(self, name: str) -> Callable[..., Any]:
        if name not in self.policies and name not in POLICIES:
            known = ", ".join([*POLICIES, *self.policies])
            raise ValueError(f"expected a view among {known}, got {name!r}; choose one, or add it to data.policies")
        return self.policies.get(name) or POLICIES[name]

    def _is_built_in(self, name: str) -> bool:
        return name in POLICIES and name not in self.policies

    def _takes_batches(self, name: str) -> bool:
        """Return whether a policy takes batches; those of this package do, which spares a look at the signature."""
        return self._is_built_in(name) or takes_batches(self._policy(name))

    def _worker_policies(self, streamed: bool) -> tuple[tuple[Policy | None, ...], ...]:
        """Return, for each view, the policies of its blocks that workers apply; None for blocks made on the device.

        Workers apply transforms of one image. Policies of batches are applied on the device, except where workers decode
        the images anyway and the device is the CPU, so that views, too, are made in parallel to the training step.
        """
        on_cpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cpu"
        found = []
        for view in self._views():
            names = (view,) if isinstance(view, str) else view
            batched = [name for name in names if self._takes_batches(name)]
            # a policy of the user may need the device, and the blocks of a view share one random stream
            here = streamed and on_cpu and all(map(self._is_built_in, batched))
            batch_policy = self._built_in if here else lambda name: None
            found.append(tuple(batch_policy(name) if name in batched else self._policy(name) for name in names))
        return tuple(found)

    def _built_in(self, name: str) -> Policy:
        if name == "none":
            return partial(augment, policy=name, size=self.image_size)
        return partial(augment, policy=name, padding=self.crop_padding, flip=self.flip, size=self.image_size)

    def _request(self, epoch: int, step: int, index: Tensor) -> RowRequest:
        streamed = self.store("train").resident is None
        return RowRequest(index, self._worker_policies(streamed), (self.seed, self._processes[0], epoch, step))

    # Batches -------------------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert the output of a loader of this data module, on the device, to images and labels.

        Batches of other loaders, which a subclass may return, are unchanged.
        """
        assert self.trainer is not None  # this hook is called by a trainer only
        if not isinstance(batch, SplitItem):
            self.served_split = None
            return batch
        self.served_split = batch.split
        made = self._training_batch(batch) if batch.stream else self.pass_batch(batch, batch.split)
        # Pure 16- or 64-bit training converts batches before this hook, when the batch contains no images yet.
        return self.trainer.precision_plugin.convert_input(made)

    def _training_batch(self, item: SplitItem) -> NoisyBatch:
        index, samples = item.indices, item.samples
        wanted = [(view,) if isinstance(view, str) else view for view in self._views()]
        ready = (
            samples.views if isinstance(samples, Row) and samples.views else [[None] * len(names) for names in wanted]
        )
        images = self._images(samples, item.split) if any(None in blocks for blocks in ready) else None
        views = []
        for number, names in enumerate(wanted):
            generator = view_generator(item.stream, number)
            size = len(index) // len(names)
            blocks = [
                self._augmented(cast(Tensor, images)[first : first + size], name, generator) if made is None else made
                for first, name, made in zip(range(0, len(index), size), names, ready[number], strict=True)
            ]
            views.append(_unit(blocks[0] if len(blocks) == 1 else torch.cat(blocks)))
        labels, true_labels = self._labels(item.split, index)
        return NoisyBatch(views[0], labels, index, true_labels, tuple(views))

    def pass_batch(
        self,
        item: Tensor | Row | SplitItem,
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
        index = item if isinstance(item, Tensor) else item.indices
        images = self._images(item.samples if isinstance(item, SplitItem) else item, split)
        if device is not None:
            index, images = index.to(device), images.to(device)
        viewed = self._augmented(images, policy, generator)
        labels, true_labels = self._labels(split, index)
        return NoisyBatch(_unit(viewed), labels, index, true_labels)

    def batch(
        self,
        split: str,
        index: Tensor,
        images: Tensor | None = None,
        generator: torch.Generator | None = None,
        policy: str = "weak",
    ) -> NoisyBatch:
        """Return samples by position, without a loader; images of streamed sets are decoded in this process.

        Args:
            split: ``train``, ``val``, ``test`` or the name of a further test set.
            index: positions in the split, shape (B,), int64.
            images: decoded images, shape (B, C, H, W), uint8; None looks them up.
            generator: random generator of the view; None disables augmentation.
            policy: name of the view, see `policies`.

        Returns:
            Images in [0, 1], float32, with the given labels, on the device of the index; true labels for training and
            validation if known. The labels of the test set are assumed correct and returned as labels.

        Raises:
            ValueError: if the split or policy is unknown.
        """
        images = self.store(split).look_up(index) if images is None else images
        viewed = self._augmented(images, "none" if generator is None else policy, generator)
        labels, true_labels = self._labels(split, index)
        return NoisyBatch(_unit(viewed), labels, index, true_labels)

    def _augmented(self, images: Tensor, name: str, generator: torch.Generator | None) -> Tensor:
        """Return a view of bytes (B, C, H, W), augmented and cropped to the image size, as bytes."""
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
        return batch_view(policy, images, generator)

    def _images(self, item: Tensor | Row, split: str) -> Tensor:
        """Return the images of a row, as bytes."""
        if isinstance(item, Tensor):
            return self.store(split).look_up(item)
        return item.images if len(item.images) == len(item.place) else select_rows(item.images, item.place)

    def _labels(self, split: str, index: Tensor) -> tuple[Tensor, Tensor | None]:
        key = (split, index.device)
        if key not in self._labels_on_device:
            table = self.table(split)
            true = None if table.true_labels is None else table.true_labels.to(index.device)
            self._labels_on_device[key] = (table.labels.to(index.device), true)
        labels, true_labels = self._labels_on_device[key]
        return labels[index], None if true_labels is None else true_labels[index]


def _unit(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255)
