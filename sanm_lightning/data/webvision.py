"""WebVision 1.0 (Li et al., 2017), by default its first 50 classes (mini-WebVision), with ImageNet as a second test set."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from sanm_lightning.data.image_files import list_class_folder
from sanm_lightning.data.list_files import Listed, read_pairs
from sanm_lightning.data.listed_images import ListedImages
from sanm_lightning.data.source import Source

__all__ = ["WebVision"]

ALL_CLASSES = 1000


class WebVision(ListedImages):
    """WebVision 1.0: images found by Google for the names of ImageNet's classes; about 66,000 of the first 50 classes.

    The root contains ``info/train_filelist_google.txt`` and ``info/val_filelist.txt`` with lines ``path label``,
    ``info/synsets.txt`` with the class names, the training images at their paths, and ``val_images_256/``. Lines of other
    classes are ignored. There are two test sets: ``test``, WebVision's validation set, and ``imagenet``, the validation
    images of ImageNet of the same classes, in folders named by class index or by WordNet id. With ``top_k``, both
    accuracies are logged for both, such as ``imagenet/acc`` and ``imagenet/acc_top5``.

    Source: Li et al., 2017; classes and test sets as in the code of DivideMix (Li et al., ICLR 2020).

    Args:
        root: folder that contains ``info``.
        first_classes: number of classes, from the first on, up to 1,000.
        imagenet: folder with one folder of images per class, relative to the root; None: only WebVision's own test set.
        top_k: also log the fraction of labels among the k most probable classes; None disables it.
        image_size: side of the square images in pixels.
        decode_size: side of the decoded squares in pixels.
        crop_padding: pixels of zero padding for random crops.
        batch_size: training samples per step and process.
        mean: channel means of the training images; those of ImageNet.
        std: channel standard deviations of the training images; those of ImageNet.
        **kwargs: as for `ListedImages`.

    Raises:
        ValueError: if ``first_classes`` is out of range; on access, if a list is damaged.
        FileNotFoundError: on access, if lists or images are missing.
    """

    where = "the resized images (google, val_images_256) and info of WebVision 1.0 (https://data.vision.ee.ethz.ch/cvl/webvision)"

    def __init__(
        self,
        root: str = "data",
        first_classes: int = 50,
        imagenet: str | None = "imagenet/val",
        top_k: int | None = 5,
        image_size: int = 299,
        decode_size: int | None = 320,
        crop_padding: int = 0,
        batch_size: int = 64,
        mean: tuple[float, float, float] | None = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] | None = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root, image_size=image_size, decode_size=decode_size, crop_padding=crop_padding, batch_size=batch_size,
            mean=mean, std=std, **kwargs,
        )  # fmt: skip
        if not 2 <= first_classes <= ALL_CLASSES:
            raise ValueError(
                f"expected first_classes of 2 to {ALL_CLASSES}, got {first_classes}; use 50 for mini-WebVision"
            )
        self.first_classes, self.imagenet, self.top_k = first_classes, imagenet, top_k
        self._synsets: list[str] | None = None

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``test``, and ``imagenet`` unless it is disabled."""
        return ("test",) if self.imagenet is None else ("test", "imagenet")

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.first_classes

    @property
    def class_names(self) -> list[str]:
        """WordNet ids and names of the classes, as in ``info/synsets.txt``."""
        return self._lines()[: self.first_classes]

    def listed(self, split: str) -> Listed:
        """Return the images of ``train``, ``test`` or ``imagenet``."""
        if split == "imagenet":
            return self._imagenet()
        self._require("info/train_filelist_google.txt", "info/val_filelist.txt", "info/synsets.txt", "val_images_256")
        name = "train_filelist_google.txt" if split == "train" else "val_filelist.txt"
        listed = read_pairs(Path(self.root) / "info" / name, self.first_classes, below=True)
        return listed if split == "train" else listed._replace(paths=np.char.add(b"val_images_256/", listed.paths))

    def load_imagenet(self) -> Source:
        """Return the validation images of ImageNet."""
        return self.source("imagenet")

    def _imagenet(self) -> Listed:
        folder = Path(self.root) / str(self.imagenet)
        ids = [line.split()[0] for line in self.class_names]
        paths, labels = [], []
        for label, wordnet in enumerate(ids):
            own = next((folder / name for name in (str(label), wordnet) if (folder / name).is_dir()), None)
            if own is None:
                raise FileNotFoundError(
                    f"expected a folder {wordnet!r} or '{label}' with validation images of ImageNet in {str(folder)!r}, got "
                    "none; unpack them there (https://image-net.org, on request), or set --data.imagenet null to leave "
                    "them out"
                )
            found = [path.relative_to(self.root).as_posix() for path in list_class_folder(own).files]
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise FileNotFoundError(
                f"expected images in the folders of {str(folder)!r}, got none; unpack ImageNet there"
            )
        return Listed(np.array([os.fsencode(path) for path in paths]), np.array(labels))

    def _lines(self) -> list[str]:
        """Return the lines of ``info/synsets.txt``."""
        if self._synsets is None:
            self._require("info/synsets.txt")
            text = (Path(self.root) / "info" / "synsets.txt").read_text(encoding="utf-8-sig")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            wrong = next((line for line in lines if not re.match(r"n\d{8}\b", line)), None)
            if wrong is not None or len(lines) < self.first_classes:
                got = f"{wrong[:80]!r}" if wrong is not None else f"{len(lines)} lines"
                raise ValueError(
                    f"expected {self.first_classes} or more lines such as 'n01440764 tench, Tinca tinca' in "
                    f"{str(Path(self.root) / 'info' / 'synsets.txt')!r}, got {got}; unpack {self.where} again"
                )
            self._synsets = lines
        return self._synsets
