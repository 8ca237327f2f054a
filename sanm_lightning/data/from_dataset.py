"""Any map-style data set as a data module."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sanm_lightning.data.decode import Resize
from sanm_lightning.data.source import Source
from sanm_lightning.data.square_images import SquareImages
from sanm_lightning.data.wrapped import WrappedImages, WrappedSet

__all__ = ["FromDataset"]

WHAT = {"train": "training", "val": "validation", "test": "test"}


class FromDataset(SquareImages):
    """Data sets of torch, torchvision or Hugging Face, and sequences of (image, label), as a data module.

    A data set has a length and rows ``dataset[i]``: (image, label, ...), or a mapping with a column of images and one
    of labels, as in the ``datasets`` library. Images are PIL images, arrays (H, W) or (H, W, C), or tensors (H, W) or
    (C, H, W), of 8 or 16 bits; floating-point images must be multiples of 1/255 in [0, 1], such as those of
    torchvision's ``ToTensor``, and are converted exactly. Rows must not change between reads: random transforms are
    passed as ``policies``. The index of a sample is its row.

    Labels are class indices or class names. The names of the classes are those of ``features[label_key].names``,
    ``class_to_idx`` or ``classes`` of the training set, of its ``Subset`` or ``ConcatDataset`` parts, or the labels
    themselves. Labels stored apart from the images (``targets``, ``labels``, ``samples``, or a column) are read without
    decoding, after a comparison with three rows. Classes of validation and test sets with names are matched by name.

    Args:
        train: training set.
        val: validation set; its labels may be wrong. Default: none.
        test: test set, whose labels are assumed correct. Default: none. Without test and validation set, a fraction of
            the training set is held out (``holdout_fraction``).
        true_labels: true labels of the training set, if its labels are known to be noisy: N class indices or names, or
            the name of a column or an attribute. Used for metrics and the oracle only.
        image_key: name of the column of images. Default: the only one.
        label_key: name of the column of labels. Default: the only one with class names, or of integers.
        image_size: side of the square images in pixels. Default: the short side of the first training image.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        channels: number of channels: 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
        resize: ``crop`` resizes the short side to ``decode_size`` and crops the center; ``stretch`` resizes both sides.
        **kwargs: as for `SquareImages` and `NoisyDataModule`; ``root`` is unused.

    Raises:
        ValueError: if rows, images or labels have another form, images change between reads, class indices have gaps and
            no names, there is only one class, or a class of another set is not a training class.
    """

    def __init__(
        self,
        train: Dataset | Sequence[Any],
        val: Dataset | Sequence[Any] | None = None,
        test: Dataset | Sequence[Any] | None = None,
        true_labels: Any = None,
        image_key: str | None = None,
        label_key: str | None = None,
        image_size: int | None = None,
        decode_size: int | None = None,
        channels: int = 3,
        resize: Resize = "crop",
        **kwargs: Any,
    ) -> None:
        given = {"train": train, "val": val, "test": test}
        self.wrapped = {
            split: WrappedSet(dataset, WHAT[split], image_key, label_key)
            for split, dataset in given.items()
            if dataset is not None
        }
        side = _short_side(self.wrapped["train"].image(0)) if image_size is None else image_size
        super().__init__(image_size=side, decode_size=decode_size, channels=channels, resize=resize, **kwargs)
        self._true_labels = true_labels
        self._class_names: list[str] | None = None
        self._train_labels: list[int | str] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the training classes, in the order of the class indices."""
        if self._class_names is None:
            self._class_names = self.wrapped["train"].class_names() or _names_of_labels(self._labels_of("train"))
        return list(self._class_names)

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``, if they are given."""
        return tuple(split for split in ("val", "test") if split in self.wrapped)

    def complete_source(self, split: str) -> Source:
        """Return ``train``, ``val`` or ``test``."""
        wrapped = self.wrapped[split]
        labels = self._indices(self._labels_of(split), wrapped.class_names(), f"the {WHAT[split]} set")
        true = self._true_indices(len(wrapped)) if split == "train" and self._true_labels is not None else None
        images = WrappedImages(wrapped, self._decoded, self.channels, self.resize)
        self._say(f"{split}: {len(labels)} images of {len(labels.unique())} classes")
        return Source(labels, images, true_labels=true)

    def _labels_of(self, split: str) -> list[int | str]:
        if split != "train":
            return self.wrapped[split].labels()
        if self._train_labels is None:
            self._train_labels = self.wrapped["train"].labels()
        return self._train_labels

    def _true_indices(self, size: int) -> Tensor:
        given, what = self._true_labels, "true_labels"
        values: Any = self.wrapped["train"].column(given) if isinstance(given, str) else given
        labels = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else [_item(value) for value in values]
        if len(labels) != size:
            raise ValueError(
                f"expected {size} true labels, one per training image, got {len(labels)}; pass all, in the order of the rows"
            )
        return self._indices(labels, self.wrapped["train"].class_names(), what)

    def _indices(self, labels: Sequence[Any], names: list[str] | None, what: str) -> Tensor:
        """Convert labels to indices of the training classes, by name if the data set has names."""
        classes = self.class_names
        index: dict[int | str, int] = {name: number for number, name in enumerate(classes)}
        if names is None:
            index |= {number: number for number in range(len(classes))}
        else:
            index |= {number: index[name] for number, name in enumerate(names) if name in index}
        unknown = [label for label in labels if label not in index]
        if unknown:
            shown = unknown[0] if names is None or unknown[0] not in range(len(names)) else names[unknown[0]]
            raise ValueError(
                f"expected labels among the {len(classes)} training classes in {what}, got {len(unknown)} others (first: "
                f"{shown!r}); correct the labels, or remove these rows"
            )
        return torch.tensor([index[label] for label in labels], dtype=torch.int64)


def _names_of_labels(labels: Sequence[int | str]) -> list[str]:
    """Return the class names of labels without names: the sorted texts, or the numbers 0 to C - 1."""
    distinct = set(labels)
    numbers = sorted(label for label in distinct if isinstance(label, int))
    if not numbers:
        return sorted(str(label) for label in distinct)
    if len(numbers) < len(distinct):
        raise ValueError(
            "expected either class indices or class names as the labels of the training set, got both; convert the labels"
        )
    missing = sorted(set(range(numbers[-1] + 1)) - distinct) if numbers[0] >= 0 else [numbers[0]]
    if missing:
        got = f"no {missing[0]}" if numbers[0] >= 0 else str(missing[0])
        raise ValueError(
            f"expected labels 0 to C - 1 without gaps in the training set, got {len(numbers)} labels up to {numbers[-1]}, "
            f"and {got}; number the classes from 0, or use class names as labels"
        )
    return [str(number) for number in numbers]


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, (Tensor, np.generic)) else value


def _short_side(image: Any) -> int:
    """Return the short side of a PIL image, an array (H, W, ...) or a tensor (..., H, W) in pixels."""
    if isinstance(image, Tensor):
        return int(min(image.shape[-2:]))
    return int(min(image.shape[:2] if isinstance(image, np.ndarray) else image.size))
