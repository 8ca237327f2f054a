"""Read images, labels and class names of any map-style data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from sanm_lightning.data.decode import UNREADABLE, Resize, square_image
from sanm_lightning.data.rows import seeded

__all__ = ["WrappedImages", "WrappedSet"]

STORED = ("targets", "labels", "_labels", "samples", "_samples", "imgs")
"""Attributes of torchvision's data sets that contain the labels, or tuples that end with the label."""

READS = 8
"""Number of times that a sample is read to recognize random transforms."""


class WrappedSet:
    """A map-style data set with rows (image, label, ...), or with named columns.

    Args:
        dataset: the data set: ``len(dataset)``, and ``dataset[i]`` for each row i.
        what: name of the data set for error messages, such as ``training``.
        image_key: name of the column of images; None selects the only one.
        label_key: name of the column of labels; None selects the only one.

    Raises:
        ValueError: if the data set has no rows, or rows of another form.
    """

    def __init__(self, dataset: Any, what: str, image_key: str | None = None, label_key: str | None = None) -> None:
        self.dataset, self.what = dataset, what
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
            raise ValueError(
                f"expected a map-style data set for the {what} set, with len(dataset) and dataset[i], got "
                f"{type(dataset).__name__}; pass one split, or convert it to a list"
            )
        if not len(dataset):
            raise ValueError(f"expected one or more rows in the {what} set, got none; check the data set")
        self.image_key, self.label_key = self._keys(image_key, label_key)
        with seeded(0):
            first = self.image(0)
        if not isinstance(first, (Image.Image, np.ndarray, Tensor)):
            raise ValueError(
                f"expected a PIL image, an array or a tensor in row 0 of the {what} set, got {type(first).__name__}; convert "
                "the images, or use CSVImages or ImageFolder for paths of files"
            )
        if not self._stays_the_same():
            raise ValueError(
                f"expected images without random transforms in the {what} set, got different images of one row; remove "
                "the random transforms from the data set, and pass them as policies"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, row: int) -> Any:
        """Return the image of a row: a PIL image, an array or a tensor."""
        return self.dataset[row][self.image_key]

    def class_names(self) -> list[str] | None:
        """Return the class names in the order of the class indices; None if the data set has none."""
        return _names(self.dataset, self.label_key)

    def labels(self) -> list[int | str]:
        """Return the label of each row; images are decoded only if the data set stores no labels."""
        stored = _stored(self.dataset, self.label_key)
        some = sorted({0, len(self) // 2, len(self) - 1})
        if stored is not None and all(self.label(row) == _plain(stored[row]) for row in some):
            found = [_plain(label) for label in stored]
        else:
            found = [self.label(row) for row in range(len(self))]
        other = next((row for row, label in enumerate(found) if label is None), None)
        if other is not None:
            raise ValueError(
                f"expected a class index or a class name as the label of each row of the {self.what} set, got another "
                f"value in row {other}; convert the labels"
            )
        return [label for label in found if label is not None]

    def label(self, row: int) -> int | str | None:
        """Return the label of a row, which may require decoding its image; None if it is no index and no name."""
        return _plain(self.dataset[row][self.label_key])

    def column(self, name: str) -> Sequence[Any]:
        """Return the values of a column or an attribute.

        Raises:
            ValueError: if there is none of this name.
        """
        if hasattr(self.dataset, name):
            values: Sequence[Any] = getattr(self.dataset, name)
            return values
        if isinstance(self.dataset[0], Mapping) and name in self.dataset[0]:
            return _column(self.dataset, name)
        raise ValueError(
            f"expected a column or an attribute {name!r} of the {self.what} set, got none in {type(self.dataset).__name__}; "
            "check the name, or pass the values"
        )

    def _keys(self, image_key: str | None, label_key: str | None) -> tuple[Any, Any]:
        """Return the keys of image and label in a row: names of columns, or 0 and 1."""
        with seeded(0):  # a random transform would use the global streams
            first = self.dataset[0]
        if not isinstance(first, Mapping):
            if not isinstance(first, (tuple, list)) or len(first) < 2:
                raise ValueError(
                    f"expected rows (image, label), or with named columns, in the {self.what} set, got "
                    f"{type(first).__name__}; wrap the data set"
                )
            return 0, 1
        named = {name for name in (_features(self.dataset) or {}) if _feature_names(self.dataset, name) is not None}
        integers = [name for name, value in first.items() if isinstance(_plain(value), int)]
        images = [name for name, value in first.items() if _is_image(value)]
        labels = [name for name in first if name in named] or integers
        return (
            self._key("image_key", image_key, images, first, "one column of images"),
            self._key("label_key", label_key, labels, first, "one column of class indices"),
        )

    def _key(self, option: str, given: str | None, found: list[str], first: Mapping[str, Any], expected: str) -> str:
        if given is None and len(found) == 1:
            return found[0]
        if given is not None and given in first:
            return given
        got = ", ".join(found) if given is None and found else f"the columns {', '.join(map(str, first))}"
        missing = "" if given is None else f" {given!r}"
        raise ValueError(f"expected {expected}{missing} in the {self.what} set, got {got}; set {option}")

    def _stays_the_same(self) -> bool:
        """Return whether reads of one row under different random seeds are equal."""
        reads = []
        for seed in range(READS):
            with seeded(seed):
                image = self.image(0)
                reads.append(_array(image) if isinstance(image, Tensor) else np.asarray(image))
        return all(np.array_equal(reads[0], other) for other in reads[1:])


class WrappedImages:
    """Map-style data set of the decoded images of a wrapped set.

    Args:
        wrapped: the wrapped set.
        side: S, side of the decoded squares in pixels.
        channels: number of channels, 1 to 4.
        resize: how other aspects become squares.
    """

    def __init__(self, wrapped: WrappedSet, side: int, channels: int, resize: Resize) -> None:
        self.wrapped, self.side, self.channels, self.resize = wrapped, side, channels, resize

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, row: int) -> Tensor:
        where = f"row {row} of the {self.wrapped.what} set"
        try:
            image = self.wrapped.image(row)
            if not isinstance(image, Image.Image):
                image = _from_array(image, where)
            return square_image(image, self.side, channels=self.channels, resize=self.resize)
        except _ImageFormError:
            raise
        except UNREADABLE as error:
            raise ValueError(
                f"expected a valid image in {where}, got one that cannot be decoded ({str(error).rstrip('.')}); replace or "
                "remove it"
            ) from error


class _ImageFormError(ValueError):
    """An image of a type, shape or range that cannot be converted."""


def _from_array(image: Any, where: str) -> Image.Image:
    """Convert an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W), to a PIL image, exactly."""
    if isinstance(image, Tensor):
        image = _array(image.permute(1, 2, 0) if image.ndim == 3 else image)
        order = "(C, H, W)"
    else:
        order = "(H, W, C)"
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] > 4):
        got = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise _ImageFormError(
            f"expected an image (H, W) or {order} of 1 to 4 channels in {where}, got {got}; convert the images"
        )
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.dtype.kind == "f":
        image = _exact_bytes(image, where)
    try:
        converted = Image.fromarray(np.ascontiguousarray(image))
    except (TypeError, KeyError):
        converted = None
    if converted is None or converted.mode == "I":  # 32 bits
        raise _ImageFormError(
            f"expected 8 or 16 bits per pixel in {where}, got {image.dtype} of shape {image.shape}; convert to uint8"
        )
    return converted


def _array(pixels: Tensor) -> np.ndarray[Any, Any]:
    """Convert a tensor to an array; floating-point values to 32 bits, because NumPy has no bfloat16."""
    array: np.ndarray[Any, Any] = (pixels.float() if pixels.is_floating_point() else pixels).detach().cpu().numpy()
    return array


def _exact_bytes(image: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """Convert floating-point values that are multiples of 1/255 in [0, 1], such as those of ``ToTensor``, to bytes."""
    scaled = image.astype(np.float64) * 255
    whole = scaled.round()
    if not np.isfinite(scaled).all() or whole.min() < 0 or whole.max() > 255 or np.abs(scaled - whole).max() > 1e-3:
        raise _ImageFormError(
            f"expected bytes, or multiples of 1/255 in [0, 1], in {where}, got floating-point values in "
            f"[{image.min():.3g}, {image.max():.3g}]; remove normalization and conversions to float from the data set, "
            "because the network normalizes"
        )
    return whole.astype(np.uint8)


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim >= 2)


def _plain(label: Any) -> int | str | None:
    """Return a label as an int or str; None if it is neither."""
    if isinstance(label, (np.ndarray, np.generic, Tensor)) and label.ndim == 0:
        label = label.item()
    return label if isinstance(label, (int, str)) else None


def _features(dataset: Any) -> Mapping[str, Any] | None:
    features = getattr(dataset.dataset if isinstance(dataset, Subset) else dataset, "features", None)
    return features if isinstance(features, Mapping) else None


def _feature_names(dataset: Any, key: Any) -> list[str] | None:
    return _strings(getattr((_features(dataset) or {}).get(key), "names", None))


def _names(dataset: Any, key: Any) -> list[str] | None:
    """Return the class names of ``features``, ``class_to_idx`` or ``classes`` of a data set or of its parts."""
    if isinstance(dataset, Subset):
        return _names(dataset.dataset, key)
    if isinstance(dataset, ConcatDataset):
        parts = [_names(part, key) for part in dataset.datasets]
        other = next((part for part in parts if part != parts[0]), parts[0])
        if None not in (parts[0], other) and other != parts[0]:
            raise ValueError(
                f"expected the same classes in all parts of a ConcatDataset, got {_first(parts[0])} and {_first(other)}, whose "
                "labels have other meanings; give the parts a common numbering of the classes"
            )
        return parts[0] if other == parts[0] else None
    if getattr(dataset, "target_transform", None) is not None:
        return None  # the names are those of the labels before the transform
    index = getattr(dataset, "class_to_idx", None)
    if isinstance(index, Mapping) and sorted(index.values()) == list(range(len(index))):
        return _strings(sorted(index, key=lambda name: index[name]))
    return _feature_names(dataset, key) or _strings(getattr(dataset, "classes", None))


def _first(names: list[str] | None) -> str:
    """Return the first five names, for messages."""
    return ", ".join(map(repr, (names or [])[:5]))


def _strings(names: Any) -> list[str] | None:
    whole = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return list(names) if whole and names and len(set(names)) == len(names) else None


def _stored(dataset: Any, key: Any) -> Sequence[Any] | None:
    """Return the labels that a data set stores apart from the images; None if there are none."""
    if isinstance(dataset, Subset):
        whole = _stored(dataset.dataset, key)
        return None if whole is None else [whole[row] for row in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_stored(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part or ()]
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        labels: Sequence[Any] = dataset.tensors[1].tolist()
        return labels
    if isinstance(key, str):
        return _column(dataset, key) if hasattr(dataset, "column_names") else None
    change = getattr(dataset, "target_transform", None) or (lambda label: label)
    for name in STORED:
        values: Any = getattr(dataset, name, None)
        if hasattr(values, "__len__") and hasattr(values, "__getitem__") and len(values) == len(dataset):
            values = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else values
            return [change(value[-1] if isinstance(value, (tuple, list)) else value) for value in values]
    return None


def _column(dataset: Any, name: str) -> Sequence[Any]:
    """Return a column of a data set with named columns."""
    if hasattr(dataset, "column_names"):
        values: Sequence[Any] = dataset[name]
        return values
    return [dataset[row][name] for row in range(len(dataset))]
