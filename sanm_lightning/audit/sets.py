"""Sets to audit: labeled images of a folder or a data module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sanm_lightning.data.image_files import count_passed_over, list_images, name_passed_over
from sanm_lightning.data.label_table import OtherSamples

__all__ = [
    "AuditSet",
    "audit_set_of",
    "fitted_rows",
    "fitted_split",
    "folder_audit_set",
    "refuse_class_folder",
]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AuditSet:
    """N labeled images to audit.

    Attributes:
        images: paths of the files, or a map-style data set of uint8 tensors (3, H, W).
        labels: given labels, shape (N,), int64, in [0, C).
        class_names: C class names.
        splits: name of the split of each image, N of them.
        paths: paths relative to ``root`` with ``/``; None without files.
        index: position of each image in its original set, shape (N,), for data without files.
        root: folder that the paths are relative to.
        others: samples of the same original training set that are not audited; None if there are none.
        notes: sentences for the summary, such as the number of skipped files.
    """

    images: Any
    labels: Array
    class_names: list[str]
    splits: list[str]
    paths: list[str] | None = None
    index: Array | None = None
    root: Path | None = None
    others: OtherSamples | None = None
    notes: Sequence[str] = ()


def fitted_split(splits: Sequence[str]) -> str | None:
    """Return the split that probe and noise model are fitted to; None if they are fitted to several splits.

    Args:
        splits: name of the split of each sample; ``all`` for a data set without splits.
    """
    names = set(splits)
    fitted = names & {"train", "all"} or names
    return fitted.pop() if len(fitted) == 1 else None


def fitted_rows(splits: Sequence[str]) -> Array:
    """Return which samples probe and noise model are fitted to, shape (N,), bool; see :func:`fitted_split`."""
    fitted = fitted_split(splits)
    return np.array([fitted is None or split == fitted for split in splits], bool)


def folder_audit_set(root: str | Path) -> AuditSet:
    """Return the images of class folders, or of ``train/`` (``val/``, ``test/``) with class folders.

    Args:
        root: path of the folder.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if there are no images, or only one class.
    """
    root = Path(root)
    listing = list_images(root)
    passed_over = count_passed_over(listing.passed_over)
    return AuditSet(
        images=[root / path for path in listing.paths],
        labels=listing.labels.numpy(),
        class_names=listing.class_names,
        splits=listing.splits,
        paths=[path.as_posix() for path in listing.paths],
        root=root,
        notes=[f"{passed_over}.", f"{name_passed_over(listing.passed_over, root)}."] if passed_over else [],
    )


def refuse_class_folder(
    folder: Path, root: Path, paths: Sequence[str] | None, class_names: Sequence[str], option: str
) -> None:
    """Refuse a folder of results that would become a class, or part of a class, of the audited class folders.

    Args:
        folder: folder to write.
        root: audited folder.
        paths: paths of the audited files, relative to ``root``; None without files.
        class_names: class names, which are those of folders if the set consists of class folders.
        option: option that sets another folder.

    Raises:
        ValueError: if the folder is inside a folder whose folders are classes.
    """
    first_two = {tuple(path.split("/")[:2]) for path in paths or ()}
    above = {parts[:1] for parts in first_two if parts[0] not in class_names and parts[-1] in class_names}
    above |= {() for parts in first_two if parts[0] in class_names}
    for base in sorted(root.joinpath(*parts) for parts in above):
        if base.resolve() in folder.resolve().parents:
            raise ValueError(
                f"expected a folder outside of {str(base)!r}, whose folders are classes, got {str(folder)!r}; use another "
                f"{option}"
            )


class _SplitImages:
    """Decoded images of a split of a data module, in RGB."""

    def __init__(self, images: Any, origin: Tensor) -> None:
        self.images, self.origin = images, origin.tolist()

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, row: int) -> Tensor:
        image: Tensor = self.images[self.origin[row]]
        colors = image[: 3 if len(image) >= 3 else 1]  # without alpha
        return colors if len(colors) == 3 else colors.expand(3, -1, -1)


def audit_set_of(data: Any, split: str = "train") -> AuditSet:
    """Return a split of a data module of this package, with the labels of a training run.

    Args:
        data: the data module.
        split: ``train``, ``val``, ``test`` or the name of a further test set.

    Raises:
        ValueError: if the split does not exist, or the data module is not a subclass of `NoisyDataModule`.
    """
    if not all(hasattr(data, name) for name in ("table", "source_images", "class_names")):
        raise ValueError(
            f"expected a data module with labels by index, got {type(data).__name__}; use a subclass of "
            "NoisyDataModule, or a folder"
        )
    data.prepare_data()
    table = data.table(split)
    paths = data.sample_paths(split)
    return AuditSet(
        images=_SplitImages(data.source_images(split), table.origin),
        labels=table.labels.numpy(),
        class_names=list(data.class_names),
        splits=[split] * len(table.labels),
        paths=paths,
        index=None if paths is not None else table.origin.numpy(),
        root=Path(data.root) if paths is not None else None,
        others=None if split in data.own_splits else data.other_samples(split),
    )
