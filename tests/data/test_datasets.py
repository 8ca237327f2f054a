"""The data sets that come by name: digits, CIFAR, blobs."""

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from sanm_lightning import data as rooms
from sanm_lightning.data import CIFAR10, CIFAR100, Digits, Noise, NoisyDataModule, Toy


class TestDigits:
    def test_is_the_same_split_for_every_seed_and_every_digit_once(self) -> None:
        first, second = Digits(seed=0), Digits(seed=1)
        first.setup()
        assert torch.equal(first.labels, second.labels)
        assert first.num_samples == 1297 and len(first.load_test().labels) == 500
        both = torch.cat([first.load_train().images[:, 0], first.load_test().images[:, 0]]).flatten(1)  # type: ignore
        assert len(both) == 1797 and len(both.unique(dim=0)) == 1797

    def test_images_are_grey_and_use_the_range(self) -> None:
        batch = Digits(seed=0).batch("train", torch.arange(100))
        assert batch.images.shape == (100, 3, 32, 32)
        assert torch.equal(batch.images[:, 0], batch.images[:, 2])
        assert batch.images.min() == 0 and batch.images.max() > 0.95

    def test_can_be_smaller_and_of_their_own_size_they_are_the_originals(self) -> None:
        from sklearn.datasets import load_digits

        assert Digits(image_size=16).batch("test", torch.arange(2)).images.shape == (2, 3, 16, 16)
        own = Digits(image_size=8)
        sums = torch.cat([source.images[:, 0].sum((1, 2)) for source in (own.load_train(), own.load_test())])  # type: ignore
        # counts in 0 to 16 become bytes: each is off by half of one at most
        counts = torch.from_numpy(load_digits().images).sum((1, 2))
        assert torch.allclose(sums.sort().values.double() * 16 / 255, counts.sort().values, atol=64 * 0.5 * 16 / 255)
        with pytest.raises(ValueError, match=r"expected image_size of 8 pixels.* or more, got"):
            Digits(image_size=7)

    def test_is_neither_cropped_nor_mirrored_unless_asked(self) -> None:
        data = Digits(seed=0)
        index = torch.arange(5)
        augmented = data.batch("train", index, generator=torch.Generator())
        assert torch.equal(augmented.images, data.batch("train", index).images)
        assert data.batch_size == 64 and Digits(flip=True).flip


class TestCIFAR:
    @staticmethod
    def write(root: Path, kind: type[torchvision.datasets.CIFAR10], classes: int) -> np.ndarray:
        """Files in torchvision's layout with two images per class and file."""
        folder = root / kind.base_folder
        folder.mkdir(parents=True)
        key, names = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
        random = np.random.default_rng(0)
        first = None
        for name, _ in (*kind.train_list, *kind.test_list):
            pixels = random.integers(0, 256, (2 * classes, 3072), dtype=np.uint8)
            first = pixels if first is None else first
            (folder / name).write_bytes(pickle.dumps({"data": pixels, key: list(range(classes)) * 2}))
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps({names: [str(c) for c in range(classes)]}))
        assert first is not None
        return first

    @pytest.mark.parametrize(
        ("module", "kind", "classes", "size"),
        [(CIFAR10, torchvision.datasets.CIFAR10, 10, 100), (CIFAR100, torchvision.datasets.CIFAR100, 100, 200)],
    )
    def test_reads_the_files_of_torchvision(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        module: type[NoisyDataModule],
        kind: type[torchvision.datasets.CIFAR10],
        classes: int,
        size: int,
    ) -> None:
        pixels = self.write(tmp_path, kind, classes)
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
        monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args: True)
        data = module(str(tmp_path), noise=Noise("symmetric_exclusive", 0.5), seed=0)
        assert (data.num_classes, data.image_size, len(data.class_names)) == (classes, (32, 32), classes)
        data.prepare_data()
        data.setup()
        assert data.num_samples == size and data.measured_noise_rate == 0.5
        image = data.batch("train", torch.tensor([3])).images[0]
        assert torch.equal((image * 255).round().to(torch.uint8).flatten(), torch.from_numpy(pixels[3]))

    def test_class_names_are_in_the_order_of_the_fine_ids(self) -> None:
        names = CIFAR100().class_names
        assert (names[0], names[4], names[23], names[68], names[99]) == ("apple", "beaver", "cloud", "road", "worm")
        assert CIFAR10().class_names[9] == "truck"

    def test_says_where_the_files_belong(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"expected the files of CIFAR10.*'cifar-10-batches-py'.*--data\.root"
        ):
            CIFAR10(str(tmp_path)).setup()
        with pytest.raises(FileNotFoundError, match="got missing or damaged files"):
            CIFAR100(str(tmp_path), download=False).prepare_data()

        def fail(*args: object, **kwargs: object) -> None:
            raise URLError("no route")

        monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
        with pytest.raises(
            FileNotFoundError, match=r"got no files of CIFAR100 and a failed download.*no route.*--data\.root"
        ):
            CIFAR100(str(tmp_path)).prepare_data()


class TestToy:
    def test_is_a_function_of_the_seed(self) -> None:
        first, same, other = (Toy(seed=s).batch("train", torch.arange(8)).images for s in (0, 0, 1))
        assert torch.equal(first, same) and not torch.equal(first, other)

    def test_can_look_like_cifar10(self) -> None:
        data = Toy(num_classes=10, image_size=32)
        assert (data.num_classes, data.image_size, data.num_samples) == (10, (32, 32), 64)

    def test_can_be_learned_from_class_means(self) -> None:
        data = Toy(seed=0, num_samples=200)
        train, test = data.batch("train", torch.arange(200)), data.batch("test", torch.arange(32))
        means = torch.stack([train.images[train.labels == c].mean(0) for c in range(4)]).flatten(1)
        predicted = torch.cdist(test.images.flatten(1), means).argmin(1)
        assert torch.equal(predicted, test.labels)

    def test_refuses_nothing_at_all(self) -> None:
        with pytest.raises(ValueError, match="of 1 or more, got"):
            Toy(num_samples=0)


class TestExports:
    def test_everything_promised_is_there(self) -> None:
        assert all(hasattr(rooms, name) for name in rooms.__all__)
