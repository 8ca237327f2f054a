"""Base class of data sets whose images are listed in text files, of up to millions of images."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sanm_lightning.data.decode import ImageFileList
from sanm_lightning.data.image_folder import ImageFiles
from sanm_lightning.data.list_files import Listed, PathList, keep_present
from sanm_lightning.data.source import Source

__all__ = ["ListedImages"]


class ListedImages(ImageFiles):
    """Base class of the data sets with official lists of images.

    A subclass defines ``names`` (or `class_names`) and `listed`. Paths are stored as bytes, so that a million images take
    about a hundred bytes each. The existence of all files is checked by listing their folders.

    Args:
        root: folder that contains the files; paths are relative to it.
        skip_missing: leave out listed images whose files do not exist, instead of raising an error; their number is logged.
        **kwargs: as for `ImageFiles`.

    Raises:
        FileNotFoundError: on access, if lists or images are missing; the message says where to get them.
        ValueError: on access, if a list is damaged, or a label is out of range.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Class names, in the order of the class indices."""
    where: ClassVar[str] = "the images"
    """What to unpack in the root, and where to get it."""

    def __init__(self, root: str = "data", skip_missing: bool = False, **kwargs: Any) -> None:
        super().__init__(root=root, **kwargs)
        self.skip_missing = skip_missing

    @property
    def class_names(self) -> list[str]:
        """Class names, in the order of the class indices."""
        return list(self.names)

    @abstractmethod
    def listed(self, split: str) -> Listed:
        """Return the images of a split, with paths relative to the root."""

    def complete_source(self, split: str) -> Source:
        """List the files of a split, and check that they exist."""
        listed, left_out = keep_present(
            self.listed(split), Path(self.root), f"the {split} split", self.skip_missing, self.where
        )
        classes = len(np.unique(listed.labels))
        self._say(f"{split}: {', '.join([f'{len(listed.labels)} images of {classes} classes', *left_out])}")
        paths = PathList(listed.paths, str(Path(self.root)) + "/")
        files = ImageFileList(paths, self._decoded, self.channels, self.resize)
        return Source(torch.from_numpy(listed.labels), files, PathList(listed.paths))

    def classes_without(self, labels: Tensor) -> str:
        """Return no names: the classes are those of the official lists, whatever a split contains."""
        return ""

    def _require(self, *names: str) -> None:
        """Check that files or folders exist in the root.

        Raises:
            FileNotFoundError: if one is missing.
        """
        missing = [name for name in names if not (Path(self.root) / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"expected {', '.join(names)} in {self.root!r}, got none of the name {missing[0]!r}; unpack {self.where} "
                "there, or set its location with --data.root"
            )
