"""Data sets of image files, and image folders with one subfolder per class."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn

from sanm_lightning.data.decode import ImageFileList, read_image, unreadable_reason
from sanm_lightning.data.image_files import (
    PassedOver,
    add_passed_over,
    class_folders,
    count_passed_over,
    list_class_folder,
    name_passed_over,
    same_but_for_case,
    split_folders,
)
from sanm_lightning.data.left_out import listed_bad_files, name_bad
from sanm_lightning.data.source import Source
from sanm_lightning.data.square_images import SquareImages

__all__ = ["Fault", "ImageFiles", "ImageFolder", "Listing", "ScannedFiles", "read_image", "unreadable_reason"]


class Fault(NamedTuple):
    """A fault in the listing of a data set, which prevents training.

    Attributes:
        path: path of the file or folder, relative to the root of the data set.
        reason: a few words.
        error: the exception that is raised when the data are loaded.
    """

    path: str
    reason: str
    error: ValueError | OSError


class Listing(NamedTuple):
    """The files of a split, before any of them is decoded.

    Attributes:
        files: N paths.
        labels: N class indices.
        class_names: names of the C training classes.
        paths: N paths relative to the root of the data set, with ``/``.
        passed_over: skipped files by reason.
        faults: faults of the split.
    """

    files: list[Path]
    labels: list[int]
    class_names: list[str]
    paths: list[str]
    passed_over: PassedOver
    faults: list[Fault]


class ImageFiles(SquareImages):
    """Base class of data sets of image files, in any format supported by Pillow; see `SquareImages`.

    Args:
        root: folder that contains the files; paths are relative to it.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        bad_files: ``bad_files.csv`` of ``sanm check-data``: files, class folders and rows to leave out, without
            decoding. The row of a class folder is ignored, with a line in the log, if the folder has images that are not
            listed.
        **kwargs: as for `SquareImages` and `NoisyDataModule`.

    Raises:
        ValueError: as for `SquareImages`.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        decode_size: int | None = None,
        bad_files: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, image_size=image_size, decode_size=decode_size, **kwargs)
        self.bad_files = bad_files
        self._listed: dict[str, str] | None = None

    def known_bad(self, source: Source) -> dict[int, str]:
        """Return the rows of the files listed in ``bad_files``, with reasons."""
        listed = self._listed_bad()
        return {row: listed[path] for row, path in enumerate(source.paths or []) if path in listed}

    def _listed_bad(self) -> dict[str, str]:
        """Return the paths listed in ``bad_files``, with reasons."""
        if self._listed is None:
            self._listed = {} if self.bad_files is None else listed_bad_files(self.bad_files)
        return self._listed


class ScannedFiles(ImageFiles):
    """Base class of data sets whose files are found, and checked, by `listing` them.

    A subclass defines `listing` and ``class_names``. All arguments are those of `ImageFiles`.
    """

    @abstractmethod
    def listing(self, split: str) -> Listing:
        """List the files of ``train``, ``val`` or ``test`` with all faults, without decoding."""

    def left_out(self, fault: Fault) -> bool:
        """Return whether a file, folder or row with a fault is left out, because it is listed in ``bad_files``."""
        return fault.path in self._listed_bad()

    def complete_source(self, split: str) -> Source:
        """Return the files of ``train``, ``val`` or ``test``, and log their number.

        A fault raises its error, unless it is left out and there are other files.
        """
        found = self.listing(split)
        for fault in found.faults:
            if not found.files or not self.left_out(fault):
                raise fault.error
        if found.faults:
            listed = self._listed_bad()
            bad = [(fault.path, listed.get(fault.path, fault.reason)) for fault in found.faults]
            self._say(f"{split}: left out as bad: {name_bad(bad)}")
        skipped = count_passed_over(found.passed_over)
        self._say(f"{split}: {len(found.files)} images of {len(set(found.labels))} classes{skipped and ', ' + skipped}")
        if skipped:
            self._say(f"{split}: {name_passed_over(found.passed_over, Path(self.root))}")
        for one, other in same_but_for_case(found.class_names if split == "train" else [])[:1]:
            rank_zero_warn(
                f"expected class names that differ in more than case, got {one!r} and {other!r}; rename one of them, unless "
                "they are two classes"
            )
        for one, other in same_but_for_case(found.paths)[:1]:
            rank_zero_warn(
                f"expected file names that differ in more than case, got {one!r} and {other!r}; rename one of them, "
                "because many file systems would keep only one"
            )
        images = ImageFileList(found.files, self._decoded, self.channels, self.resize)
        return Source(torch.tensor(found.labels, dtype=torch.int64), images, found.paths)


class ImageFolder(ScannedFiles):
    """Images in ``root/train/<class>/`` and, optionally, ``root/val/<class>/`` and ``root/test/<class>/``.

    Classes are the subfolders of ``root/train``, sorted by name, and are searched recursively. Other files are skipped,
    and their number and names are logged; see `list_class_folder`. A root of class folders, without ``train``, is a
    training set. Without a test and a validation folder, a fraction of the training set is held out
    (``holdout_fraction``). Without a training folder, a model trained on the same classes can be evaluated. The labels
    are those of the folders; the true labels are unknown, unless this data module injects noise.

    Args:
        root: folder that contains ``train`` or class folders.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares, such as 256 for an image size of 224; None uses the image size.
        **kwargs: as for `ImageFiles`, `SquareImages` and `NoisyDataModule`.

    Raises:
        ValueError: if image_size is smaller than 1; on access, if there are no classes or only one, a class has no
            images, a class of another split is not a training class, or a file cannot be decoded.
        FileNotFoundError: on access, if the folder does not exist or has no training set.
        PermissionError: on access, if a class folder cannot be read.
    """

    def __init__(
        self, root: str = "data", image_size: int = 224, decode_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(root=root, image_size=image_size, decode_size=decode_size, **kwargs)
        self._found: tuple[dict[str, list[Path]], PassedOver] | None = None
        self._class_names: list[str] | None = None
        self._own_splits: tuple[str, ...] | None = None
        self._left_out_classes: set[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The class folders of the training set, or of all splits if there is no training set, sorted."""
        if self._class_names is None:
            folders = self._folders()
            bases = folders.get("train") or [base for part in folders.values() for base in part]
            names = {name for base in bases for name in class_folders(base)[0]}
            self._class_names = sorted(names - self.left_out_classes())
        return list(self._class_names)

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``, if their folders contain class folders."""
        if self._own_splits is None:
            self._own_splits = tuple(
                split
                for split, bases in self._folders().items()
                if split != "train" and any(class_folders(base, required=False)[0] for base in bases)
            )
        return self._own_splits

    def listing(self, split: str) -> Listing:
        """List the files of ``train``, ``val`` or ``test`` with all faults, without decoding."""
        bases = self._folders().get(split) or split_folders(self.root)[0][split]  # raises without a training set
        label_of = {name: label for label, name in enumerate(self.class_names)}
        found = Listing([], [], self.class_names, [], {}, [])
        if split == next(iter(self._folders())) and self._found is not None:
            add_passed_over(found.passed_over, self._found[1])
        for base in bases:
            names, loose = class_folders(base)
            add_passed_over(found.passed_over, loose)
            for name in names:
                if name not in label_of:
                    fault = ValueError(
                        f"expected {split} classes among the {len(label_of)} training classes, got {name!r}; rename or "
                        f"remove {str(base / name)!r}"
                    )
                    found.faults.append(Fault(self._relative(base / name), "class unknown in training", fault))
                    continue
                try:
                    files, others = list_class_folder(base / name)
                except PermissionError as error:
                    found.faults.append(Fault(self._relative(base / name), "folder that cannot be read", error))
                    continue
                if not files:
                    fault = ValueError(
                        f"expected images in {str(base / name)!r}, got none "
                        f"({count_passed_over(others) or 'empty folder'}); add images, remove the folder, or "
                        "list it with sanm check-data and use --data.bad_files"
                    )
                    found.faults.append(Fault(self._relative(base / name), "class without images", fault))
                add_passed_over(found.passed_over, others)
                found.files.extend(files)
                found.labels.extend([label_of[name]] * len(files))
        found.paths.extend(map(self._relative, found.files))
        return found

    def left_out(self, fault: Fault) -> bool:
        """Return whether a class folder is left out: it is listed in ``bad_files``, or that of the training set is."""
        return super().left_out(fault) or Path(fault.path).name in self.left_out_classes()

    def left_out_classes(self) -> set[str]:
        """Return the classes whose training folder is listed in ``bad_files``, and has no images that are not listed."""
        if self._left_out_classes is None:
            bases = self._folders().get("train", []) if self._listed_bad() else []
            folders = [base / name for base in bases for name in class_folders(base)[0]]
            listed = [folder for folder in folders if self._relative(folder) in self._listed_bad()]
            stale = [folder for folder in listed if self._has_other_images(folder)]
            for folder in stale:
                self._say(
                    f"train: {self._relative(folder)} has images that are not listed in {self.bad_files}, and is kept; run "
                    "sanm check-data again"
                )
            self._left_out_classes = {folder.name for folder in listed if folder not in stale}
        return self._left_out_classes

    def _has_other_images(self, folder: Path) -> bool:
        """Return whether a folder has images that are not listed in ``bad_files``."""
        try:
            files = list_class_folder(folder).files
        except PermissionError:
            return False
        return any(self._relative(file) not in self._listed_bad() for file in files)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _folders(self) -> dict[str, list[Path]]:
        """Return the folders of each split; a root of class folders is a training set."""
        if self._found is None:
            parts, passed_over = split_folders(self.root, required=False)
            self._found = {"train" if split == "all" else split: bases for split, bases in parts.items()}, passed_over
        return self._found[0]
