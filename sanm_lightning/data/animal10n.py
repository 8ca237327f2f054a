"""Animal-10N (Song et al., ICML 2019): animals that look alike, labeled by people."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from sanm_lightning.data.image_files import list_class_folder
from sanm_lightning.data.list_files import Listed
from sanm_lightning.data.listed_images import ListedImages

__all__ = ["Animal10N"]


class Animal10N(ListedImages):
    """Animal-10N: 50,000 training images with about 8 % wrong labels and 5,000 test images of 64 x 64 pixels, 10 classes.

    The root contains ``training/`` and ``testing/``, with files ``<label>_<name>.jpg``. Files are sorted by name.

    Source: Song et al., ICML 2019 (SELFIE).

    Args:
        root: folder that contains ``training`` and ``testing``.
        image_size: side of the square images in pixels.
        **kwargs: as for `ListedImages`.

    Raises:
        FileNotFoundError: on access, if a folder is missing.
        ValueError: on access, if a file name does not begin with a label.
    """

    names = (
        "cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea_pig",
    )  # fmt: skip
    where = "the images of Animal-10N (on request from https://dm.kaist.ac.kr/datasets/animal-10n)"

    def __init__(self, root: str = "data", image_size: int = 64, crop_padding: int = 8, **kwargs: Any) -> None:
        super().__init__(root=root, image_size=image_size, crop_padding=crop_padding, **kwargs)

    def listed(self, split: str) -> Listed:
        """Return the images of ``train`` or ``test``, with the labels of their names."""
        self._require("training", "testing")
        folder = {"train": "training", "test": "testing"}[split]
        files = list_class_folder(Path(self.root) / folder).files
        paths = [path.relative_to(self.root).as_posix() for path in files]
        labels = [path.name.partition("_")[0] for path in files]
        wrong = [n for n, label in enumerate(labels) if not (label.isascii() and label.isdigit() and int(label) < 10)]
        if wrong or not files:
            got = f"{len(wrong)} others (first: {paths[wrong[0]]!r})" if wrong else "none"
            raise ValueError(
                f"expected files '<label>_<name>.jpg' with labels 0 to 9 in {str(Path(self.root) / folder)!r}, got {got}; "
                f"unpack {self.where} again"
            )
        return Listed(np.array([os.fsencode(path) for path in paths]), np.array([int(label) for label in labels]))
