"""Clothing1M (Xiao et al., CVPR 2015): a million clothing images labeled by the words around them."""

from pathlib import Path
from typing import Any

import numpy as np

from sanm_lightning.data.list_files import Listed, join_labels, read_keys, read_pairs, without_prefix
from sanm_lightning.data.listed_images import ListedImages

__all__ = ["Clothing1M"]

KEYS = {"train": "noisy_train_key_list.txt", "val": "clean_val_key_list.txt", "test": "clean_test_key_list.txt"}
TABLES = {"train": "noisy_label_kv.txt", "val": "clean_label_kv.txt", "test": "clean_label_kv.txt"}
PAIRS = {"train": "noisy_train.txt", "val": "clean_val.txt", "test": "clean_test.txt"}
FOLDERS = (".", "annotations", "annotation", "label", "labels")
IMAGES = b"images/"


class Clothing1M(ListedImages):
    """Clothing1M: a million training images with noisy labels, 14,313 clean validation and 10,526 clean test images.

    Lists are read from the root or its folder ``annotations``, ``annotation``, ``label`` or ``labels``, in one of two forms:

    - official: ``noisy_train_key_list.txt`` and so on, one path per line, with the labels in ``noisy_label_kv.txt`` and
      ``clean_label_kv.txt``, lines ``path label``;
    - ``noisy_train.txt``, ``clean_val.txt`` and ``clean_test.txt``, lines ``path label``, as in SANM's code.

    Paths may begin with ``images/`` or not, in each file; the files are in ``root/images/``, or in the root if it has no
    such folder. As published, an epoch samples a new class-balanced subset of the training set, of ``samples_per_epoch``
    images, separately for each network of a method.

    Source: Xiao et al., CVPR 2015; subset, sizes and statistics as in the code of DivideMix (Li et al., ICLR 2020).

    Args:
        root: folder that contains lists and images.
        samples_per_epoch: size of the class-balanced subset of an epoch; 32,000 are 1,000 batches of 32. None uses all.
        balanced: whether the subset has equal class sizes.
        batch_size: training samples per step and process.
        decode_size: side of the decoded squares in pixels.
        crop_padding: pixels of zero padding for random crops.
        mean: channel means of the training images.
        std: channel standard deviations of the training images.
        **kwargs: as for `ListedImages`.

    Raises:
        FileNotFoundError: on access, if lists or images are missing.
        ValueError: on access, if a list is damaged, or a label is out of range or missing.
    """

    names = (
        "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket", "Downcoat", "Suit",
        "Shawl", "Dress", "Vest", "Underwear",
    )  # fmt: skip
    where = "the images and the annotations of Clothing1M (on request, see https://github.com/Cysu/noisy_label)"
    own_splits = ("val", "test")

    def __init__(
        self,
        root: str = "data",
        samples_per_epoch: int | None = 32_000,
        balanced: bool = True,
        batch_size: int = 64,
        decode_size: int | None = 256,
        crop_padding: int = 0,
        mean: tuple[float, float, float] | None = (0.6959, 0.6537, 0.6371),
        std: tuple[float, float, float] | None = (0.3113, 0.3192, 0.3214),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root=root, samples_per_epoch=samples_per_epoch, balanced=balanced, batch_size=batch_size,
            decode_size=decode_size, crop_padding=crop_padding, mean=mean, std=std, **kwargs,
        )  # fmt: skip

    def listed(self, split: str) -> Listed:
        """Return the images of ``train``, ``val`` or ``test``."""
        folder, official = self._lists()
        if official:
            keys_file, table_file = folder / KEYS[split], folder / TABLES[split]
            table = read_pairs(table_file, len(self.names))
            table = table._replace(paths=without_prefix(table.paths, IMAGES))
            paths = without_prefix(read_keys(keys_file), IMAGES)
            listed = Listed(paths, join_labels(paths, table, keys_file, table_file))
        else:
            listed = read_pairs(folder / PAIRS[split], len(self.names))
            listed = listed._replace(paths=without_prefix(listed.paths, IMAGES))
        return (
            listed._replace(paths=np.char.add(IMAGES, listed.paths))
            if (Path(self.root) / "images").is_dir()
            else listed
        )

    def _lists(self) -> tuple[Path, bool]:
        """Return the folder of the lists, and whether they are the official ones."""
        forms = {True: {*KEYS.values(), *TABLES.values()}, False: set(PAIRS.values())}
        for name in FOLDERS:
            for official, wanted in forms.items():
                if all((Path(self.root) / name / file).is_file() for file in wanted):
                    return Path(self.root) / name, official
        missing = {
            file for file in forms[True] if not any((Path(self.root) / name / file).is_file() for name in FOLDERS)
        }
        raise FileNotFoundError(
            f"expected the lists {', '.join(sorted(forms[True]))} or {', '.join(sorted(forms[False]))} in {self.root!r}, got "
            f"neither all of the former (missing: {', '.join(sorted(missing)) or 'none, but in different folders'}) nor of "
            f"the latter; unpack {self.where} there"
        )
