"""What is audited: labelled images of a folder or of a data module."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sanm_lightning.data.image_files import count_passed_over, list_images

__all__ = ["AuditSet", "audit_set_of", "folder_audit_set"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class AuditSet:
    """N labelled images to be audited.

    Attributes:
        images: paths of the files, or a map-style data set of uint8 tensors (3, H, W).
        labels: given labels, shape (N,), int64, in [0, C).
        class_names: C names.
        splits: name of the split of each image, N of them.
        paths: paths relative to ``root`` with ``/``; None where there are no files.
        index: position of each image in its original set, shape (N,), where there are no files.
        root: folder that the paths are relative to.
        notes: sentences for the reader, such as which files were passed over.
    """

    images: Any
    labels: Array
    class_names: list[str]
    splits: list[str]
    paths: list[str] | None = None
    index: Array | None = None
    root: Path | None = None
    notes: Sequence[str] = ()


def folder_audit_set(root: str | Path) -> AuditSet:
    """Return the images of class folders, or of ``train/`` (``val/``, ``test/``) of class folders.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no images, or one class only.
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
        notes=[f"{passed_over}."] if passed_over else [],
    )


class _SplitImages:
    """The decoded images of a split of a data module, as it serves them."""

    def __init__(self, images: Any, origin: Tensor) -> None:
        self.images, self.origin = images, origin.tolist()

    def __len__(self) -> int:
        return len(self.origin)

    def __getitem__(self, row: int) -> Tensor:
        image: Tensor = self.images[self.origin[row]]
        return image


def audit_set_of(data: Any, split: str = "train") -> AuditSet:
    """Return a split of a data module of this package with the labels that a training is given.

    Args:
        data: the data module.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: if it has no such split, or is of another kind.
    """
    if not all(hasattr(data, name) for name in ("table", "source_images", "class_names")):
        raise ValueError(
            f"expected a data module with labels by index, got {type(data).__name__}; derive it from NoisyDataModule, or give "
            "a folder"
        )
    if split not in ("train", "val", "test"):
        raise ValueError(f"expected split 'train', 'val' or 'test', got {split!r}; choose one")
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
    )
