"""Food-101N (Lee et al., CVPR 2018): dishes found on the web, with the test set of Food-101."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from sanm_lightning.data.list_files import Listed, read_keys, read_pairs
from sanm_lightning.data.listed_images import ListedImages

__all__ = ["Food101N"]

HEADER = b"class_name/key"
OTHER_HEADERS = ("class_name", "class_name/key")


class Food101N(ListedImages):
    """Food-101N: 310,009 training images with about 20 % wrong labels, 101 classes; 25,250 test images of Food-101.

    The root contains ``Food-101N_release/`` with ``images/``, ``meta/classes.txt``, ``meta/imagelist.tsv``,
    ``meta/verified_train.tsv`` and ``meta/verified_val.tsv``, and ``food-101/`` with ``images/`` and ``meta/test.txt``.
    The labels of the images in the verified files were checked by people: the images of ``verified_val.tsv`` are not used for
    training, and those whose label is correct are the validation split. The fraction of wrong labels in
    ``verified_train.tsv`` is logged.

    Source: Lee et al., CVPR 2018 (CleanNet); Bossard et al., ECCV 2014 (Food-101).

    Args:
        root: folder that contains both data sets.
        verified_val: whether to hold out the images of ``verified_val.tsv``; otherwise all images are used for training, and
            there is no validation split.
        decode_size: side of the decoded squares in pixels.
        crop_padding: pixels of zero padding for random crops.
        mean: channel means of the training images; those of ImageNet.
        std: channel standard deviations of the training images; those of ImageNet.
        **kwargs: as for `ListedImages`.

    Raises:
        FileNotFoundError: on access, if lists or images are missing.
        ValueError: on access, if a list is damaged, or a class is unknown.
    """

    where = (
        "Food-101N_release (https://kuanghuei.github.io/Food-101N) and food-101 "
        "(https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101)"
    )
    noisy, clean = "Food-101N_release", "food-101"

    def __init__(
        self,
        root: str = "data",
        verified_val: bool = True,
        decode_size: int | None = 256,
        crop_padding: int = 0,
        mean: tuple[float, float, float] | None = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] | None = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, decode_size=decode_size, crop_padding=crop_padding, mean=mean, std=std, **kwargs)
        self.verified_val = verified_val
        self._names: list[str] | None = None

    @property
    def own_splits(self) -> tuple[str, ...]:
        """``val`` and ``test``; only ``test`` if ``verified_val`` is false."""
        return ("val", "test") if self.verified_val else ("test",)

    @property
    def class_names(self) -> list[str]:
        """The lines of ``meta/classes.txt`` of Food-101N."""
        if self._names is None:
            self._require(f"{self.noisy}/meta/classes.txt")
            text = (Path(self.root) / self.noisy / "meta" / "classes.txt").read_text(encoding="utf-8-sig")
            self._names = [line.strip() for line in text.splitlines() if line.strip() not in ("", *OTHER_HEADERS)]
        return list(self._names)

    def listed(self, split: str) -> Listed:
        """Return the images of ``train``, ``val`` or ``test``, whose folder is the label."""
        meta = f"{self.noisy}/meta"
        self._require(f"{meta}/imagelist.tsv", f"{meta}/verified_train.tsv", f"{meta}/verified_val.tsv")
        self._require(f"{self.clean}/meta/test.txt")
        if split == "test":
            keys = np.char.add(read_keys(Path(self.root) / self.clean / "meta" / "test.txt"), b".jpg")
            return self._labeled(keys, self.clean, f"{self.clean}/meta/test.txt")
        if split == "val":
            verified = self._verified("verified_val.tsv")
            return self._labeled(verified.paths[verified.labels == 1], self.noisy, f"{meta}/verified_val.tsv")
        keys = read_keys(Path(self.root) / meta / "imagelist.tsv")
        keys = keys[keys != HEADER]
        if self.verified_val:
            keys = keys[~np.isin(keys, self._verified("verified_val.tsv").paths)]
        checked = self._verified("verified_train.tsv").labels
        rank_zero_info(f"Food-101N: {1 - checked.mean():.2%} of {len(checked)} verified training labels are wrong")
        return self._labeled(keys, self.noisy, f"{meta}/imagelist.tsv")

    def _verified(self, name: str) -> Listed:
        """Return the images of a verified file, with 1 for correct and 0 for wrong labels."""
        return read_pairs(Path(self.root) / self.noisy / "meta" / name, 2, header=HEADER)

    def _labeled(self, keys: np.ndarray[Any, Any], folder: str, file: str) -> Listed:
        """Return images ``class/name`` of a folder, with the class as label."""
        number = {os.fsencode(name): label for label, name in enumerate(self.class_names)}
        labels = np.array([number.get(key.partition(b"/")[0], -1) for key in keys.tolist()], dtype=np.int64)
        unknown = np.flatnonzero(labels < 0)
        if len(unknown):
            raise ValueError(
                f"expected paths '<class>/<name>' with the {len(number)} classes of {self.noisy}/meta/classes.txt in "
                f"{str(Path(self.root) / file)!r}, got {len(unknown)} others (first: "
                f"{os.fsdecode(bytes(keys[unknown[0]]))!r}); correct or remove the lines"
            )
        return Listed(np.char.add(f"{folder}/images/".encode(), keys), labels)
