"""CIFAR-10N and CIFAR-100N: CIFAR with labels of human annotators (Wei et al., ICLR 2022)."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from sanm_lightning.data.cifar import CIFAR10, CIFAR100, CIFARFiles
from sanm_lightning.data.image_files import list_class_folder
from sanm_lightning.data.image_folder import read_image
from sanm_lightning.data.label_files import read_labels
from sanm_lightning.data.noise import CIFAR100_SUPERCLASSES, Noise
from sanm_lightning.data.source import Source

__all__ = ["CIFAR10N", "CIFAR100N"]

WHERE = "the folder data/ of https://github.com/UCSC-REAL/cifar-10-100n (CC BY-NC 4.0)"


class _HumanLabels(CIFARFiles):
    """CIFAR with the labels of a file, whose array of true labels is compared with those of the images."""

    keys: ClassVar[dict[str, str]]
    """Arrays of the file by name of the label set."""
    human_files: ClassVar[tuple[str, ...]]
    """Names of the file in the root, the official one first."""
    clean_key: str = "clean_label"

    def _use_human_labels(self, labels: str, file: str | None) -> None:
        if labels not in self.keys:
            raise ValueError(f"expected labels among {list(self.keys)}, got {labels!r}; choose one of them")
        if self.noise.kind != "none":
            raise ValueError(
                f"expected no noise in addition to the human labels of {type(self).__name__}, got noise of kind "
                f"{self.noise.kind!r}; omit the noise, or use the data set without human labels"
            )
        found = [name for name in self.human_files if (Path(self.root) / name).is_file()]
        path = file if file is not None else str(Path(self.root) / (found or self.human_files)[0])
        self.human_labels = labels
        self.noise = Noise(kind="file", path=path, key=self.keys[labels])

    @property
    def noise_kind(self) -> str:
        """``human_`` and the name of the label set."""
        return f"human_{self.human_labels}"

    def load_train(self) -> Source:
        """Return the training images with their true labels, after a comparison with those of the label file.

        Raises:
            FileNotFoundError: if the label file does not exist.
            ValueError: if it belongs to other images, or to another order of them.
        """
        path = Path(str(self.noise.path))
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the human labels of {type(self).__name__} in {str(path)!r}, got no such file; copy "
                f"{self.human_files[0]} there from {WHERE}, or set its path with --data.file"
            )
        source = super().load_train()
        clean = read_labels(path, len(source.labels), self.num_classes, self.clean_key)
        different = int((clean != source.labels).sum())
        if different:
            raise ValueError(
                f"expected the true labels in {str(path)!r} to be those of the images in {self.root!r}, got {different} "
                f"different ones of {len(clean)}; use the label file of these images in this order"
            )
        return source


class CIFAR10N(_HumanLabels, CIFAR10):
    """CIFAR-10 with human labels: 50,000 training images labeled by three annotators each, and the clean test set.

    The images are those of `CIFAR10`; or JPEG files ``root/train/<class>/`` and ``root/test/<class>/`` in the order of the
    label file, if the root has these folders. Fractions of wrong labels: ``aggregate`` 9.01 %, ``random1`` 17.23 %,
    ``random2`` 18.12 %, ``random3`` 17.64 %, ``worst`` 40.21 %.

    Source: Wei et al., ICLR 2022.

    Args:
        root: folder that contains ``cifar-10-batches-py``, or ``train`` and ``test`` with JPEG files.
        labels: ``aggregate`` (majority of the three annotators), ``random1``, ``random2``, ``random3`` (one annotator), or
            ``worst`` (a wrong label if there is one).
        file: the official ``CIFAR-10_human.pt``, or a ``.npz`` file with the same arrays. Default: ``CIFAR-10_human.pt`` or
            ``cifar10n.npz`` in the root.
        **kwargs: as for `CIFAR10`.

    Raises:
        ValueError: if ``labels`` is unknown, or noise is given; on access, if the label file belongs to other images.
        FileNotFoundError: on access, if a file is missing.
    """

    keys = {
        "aggregate": "aggre_label", "random1": "random_label1", "random2": "random_label2", "random3": "random_label3",
        "worst": "worse_label",
    }  # fmt: skip
    human_files = ("CIFAR-10_human.pt", "cifar10n.npz")

    def __init__(
        self,
        root: str = "data",
        labels: Literal["aggregate", "random1", "random2", "random3", "worst"] = "worst",
        file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self._use_human_labels(labels, file)

    @property
    def _jpeg(self) -> bool:
        return (Path(self.root) / "train" / self.names[0]).is_dir()

    def prepare_data(self) -> None:
        """Download the images to ``root`` if they are missing."""
        if not self._jpeg:
            super().prepare_data()

    def _read(self, train: bool) -> Source:
        if not self._jpeg:
            return super()._read(train)
        folder = Path(self.root) / ("train" if train else "test")
        files = [
            (path, label) for label, name in enumerate(self.names) for path in list_class_folder(folder / name).files
        ]
        paths = [path.relative_to(self.root).as_posix() for path, _ in files]
        return Source(torch.tensor([label for _, label in files]), _Small([path for path, _ in files]), paths)


class CIFAR100N(_HumanLabels, CIFAR100):
    """CIFAR-100 with human labels, one annotator per training image: 40.20 % of the fine labels are wrong.

    Source: Wei et al., ICLR 2022.

    Args:
        root: folder that contains ``cifar-100-python``.
        labels: ``noisy`` (100 classes), or ``noisy_coarse`` (the 20 superclasses, 26.40 % wrong).
        file: the official ``CIFAR-100_human.pt``, or a ``.npz`` file with the same arrays. Default:
            ``CIFAR-100_human.pt`` in the root.
        **kwargs: as for `CIFAR100`.

    Raises:
        ValueError: if ``labels`` is unknown, or noise is given; on access, if the label file belongs to other images.
        FileNotFoundError: on access, if a file is missing.
    """

    keys = {"noisy": "noisy_label", "noisy_coarse": "noisy_coarse_label"}
    human_files = ("CIFAR-100_human.pt", "cifar100n.npz")

    def __init__(
        self,
        root: str = "data",
        labels: Literal["noisy", "noisy_coarse"] = "noisy",
        file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self._use_human_labels(labels, file)
        if labels == "noisy_coarse":
            self.clean_key = "clean_coarse_label"

    @property
    def class_names(self) -> list[str]:
        """The fine classes, or the superclasses, in the order of the class indices."""
        return sorted(CIFAR100_SUPERCLASSES) if self.human_labels == "noisy_coarse" else list(self.names)

    @property
    def num_classes(self) -> int:
        """100, or 20 superclasses."""
        return len(self.class_names)

    def _read(self, train: bool) -> Source:
        source = super()._read(train)
        return source if self.human_labels == "noisy" else source._replace(labels=coarse_of()[source.labels])


def coarse_of() -> torch.Tensor:
    """Return the superclass of each fine class of CIFAR-100, shape (100,), int64; both are numbered alphabetically."""
    parents = {name: parent for parent, names in CIFAR100_SUPERCLASSES.items() for name in names}
    number = {parent: label for label, parent in enumerate(sorted(CIFAR100_SUPERCLASSES))}
    return torch.tensor([number[parents[name]] for name in sorted(parents)])


class _Small:
    """Map-style data set of 32 x 32 image files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return read_image(self.paths[index], 32)
