"""Any map-style data set as a data module: rows, labels, class names, and a sentence for every other form."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from sanm_lightning import FromDataset, Noise
from sanm_lightning.cli import main
from sanm_lightning.data.wrapped import WrappedSet

SIDE = 8
PIXELS = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), dtype=np.uint8)


def pairs(labels: Any = None, images: Any = None) -> list[tuple[Any, Any]]:
    labels = [number % 3 for number in range(12)] if labels is None else labels
    images = [Image.fromarray(pixels) for pixels in PIXELS] if images is None else images
    return list(zip(images, labels, strict=True))


def images_of(data: FromDataset) -> torch.Tensor:
    return data.store("train").look_up(torch.arange(data.num_samples))


def made(dataset: Any, **options: Any) -> FromDataset:
    return FromDataset(dataset, holdout_fraction=0, seed=0, crop_padding=0, flip=False, **options)


class Stored(Dataset):
    """A data set in the manner of torchvision, which counts its decoded images."""

    classes = ["ant", "bee", "cat"]

    def __init__(self, name: str = "targets", target_transform: Any = None, change: int = 0) -> None:
        self.read: list[int] = []
        self.target_transform = target_transform
        given = [number % 3 for number in range(12)]
        setattr(self, name, [("path", label) for label in given] if name == "samples" else given)
        self._given, self._change = given, change

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read.append(index)
        label = (self._given[index] + self._change) % 3
        return Image.fromarray(PIXELS[index]), self.target_transform(label) if self.target_transform else label


class Names:
    """A feature of class labels, as in the datasets library."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Rows:
    """A data set with named columns, as in the datasets library."""

    def __init__(self, features: dict[str, Any], **columns: Any) -> None:
        self.features, self.columns, self.column_names = features, columns, list(columns)
        self.decoded = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        self.decoded += 1
        return {name: values[key] for name, values in self.columns.items()}


def rows(label: str = "label", names: tuple[str, ...] = ("ant", "bee", "cat"), **more: Any) -> Rows:
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    labels = [number % 3 for number in range(12)]
    return Rows({"img": object(), label: Names(*names)}, **{"img": pictures, label: labels, **more})


class TestImages:
    @pytest.mark.parametrize(
        "images",
        [
            [Image.fromarray(pixels) for pixels in PIXELS],
            list(PIXELS),
            list(torch.from_numpy(PIXELS).permute(0, 3, 1, 2)),
            [torchvision.transforms.functional.to_tensor(pixels) for pixels in PIXELS],
            list(PIXELS / np.float32(255)),
        ],
        ids=["pil", "array", "tensor", "ToTensor", "array of floats"],
    )
    def test_of_every_type_are_the_same_bytes(self, images: Any) -> None:
        assert torch.equal(images_of(made(pairs(images=images))), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))

    @pytest.mark.parametrize("bits", [np.uint8, np.uint16])
    def test_gray_arrays(self, bits: type) -> None:
        gray = [(pixels[:, :, 0].astype(bits) * (257 if bits is np.uint16 else 1)) for pixels in PIXELS]
        expected = torch.from_numpy(PIXELS[:, None, :, :, 0])
        assert torch.equal(images_of(made(pairs(images=gray), channels=1)), expected)
        assert torch.equal(images_of(made(pairs(images=gray))), expected.expand(-1, 3, -1, -1))

    def test_sizes(self) -> None:
        wide = [Image.fromarray(pixels).resize((20, 10)) for pixels in PIXELS]
        data = made(pairs(images=wide))
        assert data.image_size == (10, 10) and images_of(data).shape == (12, 3, 10, 10)
        data = made(pairs(images=wide), image_size=4, decode_size=6)
        assert (data.image_size, data.decode_size) == ((4, 4), (6, 6))

    def test_streamed_images_equal_resident_ones(self) -> None:
        resident, streamed = (made(pairs(), resident_bytes=size) for size in (2**20, 0))
        assert streamed.store("train").resident is None
        assert torch.equal(images_of(resident), images_of(streamed))

    @pytest.mark.parametrize(
        ("image", "match"),
        [
            (
                torch.randn(3, SIDE, SIDE),
                r"or multiples of 1/255 in \[0, 1\], in row 0 of the training set, got floating-",
            ),
            (np.full((SIDE, SIDE), 200, np.int32), r"expected 8 or 16 bits per pixel in row 0 .*, got int32 of shape"),
            (torch.rand(3, SIDE, SIDE), r"got floating-point values in \[.*\]; remove normalization and conversions"),
            (torch.rand(3, SIDE, SIDE).bfloat16(), r"got floating-point values in \[.*\]; remove normalization"),
            (
                np.zeros((3, SIDE, SIDE), np.uint8),
                r"\(H, W, C\) of 1 to 4 channels in row 0 .*, got shape \(3, 8, 8\); co",
            ),
            (
                torch.zeros(SIDE, SIDE, 9, dtype=torch.uint8),
                r"\(C, H, W\) of 1 to 4 channels .*, got shape \(8, 9, 8\)",
            ),
            (
                torch.zeros(3, SIDE, SIDE, dtype=torch.int64),
                "expected 8 or 16 bits per pixel in row 0 .*, got int64 of",
            ),
        ],
    )
    def test_others_are_refused(self, image: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            images_of(made(pairs(images=[image] * 12), image_size=SIDE))
        assert "\n" not in str(error.value)

    def test_random_transforms_are_refused(self) -> None:
        class Flipped(Stored):
            def __getitem__(self, index: int) -> Any:
                return v2.RandomHorizontalFlip()(super().__getitem__(index)[0]), index % 3

        before = torch.get_rng_state()
        with pytest.raises(
            ValueError, match="without random transforms in the training set, got different images of one"
        ):
            made(Flipped())
        assert torch.equal(torch.get_rng_state(), before)


class TestLabels:
    @pytest.mark.parametrize("name", ["targets", "labels", "samples", "_labels"])
    def test_stored_ones_are_read_without_decoding(self, name: str) -> None:
        dataset = Stored(name)
        data = made(dataset)
        assert data.labels.tolist() == [0, 1, 2] * 4 and data.class_names == ["ant", "bee", "cat"]
        assert set(dataset.read) == {0, 6, 11}

    def test_stored_ones_that_are_not_those_of_the_rows_are_not_used(self) -> None:
        assert made(Stored(change=1)).labels.tolist() == [1, 2, 0] * 4

    def test_target_transforms(self) -> None:
        dataset = Stored(target_transform=lambda label: 2 - label)
        data = made(dataset)
        assert data.labels.tolist() == [2, 1, 0] * 4 and 3 not in dataset.read
        assert data.class_names == ["0", "1", "2"]  # "ant", ... are those before the transform

    def test_parts_with_other_classes_are_refused(self) -> None:
        other = Stored()
        other.classes = ["dog", "bee", "cat"]
        with pytest.raises(
            ValueError, match=r"same classes in all parts .*, got 'ant', 'bee', 'cat' and 'dog', 'bee', 'cat'"
        ):
            made(ConcatDataset([Stored(), other])).setup()

    def test_parts_of_data_sets(self) -> None:
        dataset = Stored()
        data = made(ConcatDataset([Subset(dataset, [5, 4]), Subset(dataset, [0])]))
        assert data.labels.tolist() == [2, 1, 0] and data.class_names == ["ant", "bee", "cat"]
        assert torch.equal(images_of(data), torch.from_numpy(PIXELS[[5, 4, 0]]).permute(0, 3, 1, 2))
        tensors = TensorDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.arange(12) % 3)
        assert made(tensors).labels.tolist() == [0, 1, 2] * 4

    def test_names_as_labels(self) -> None:
        data = made(pairs(["cat", "ant", "bee"] * 4))
        assert data.class_names == ["ant", "bee", "cat"] and data.labels.tolist() == [2, 0, 1] * 4

    @pytest.mark.parametrize("kind", [np.int64, torch.tensor, int])
    def test_numbers_of_any_type(self, kind: Any) -> None:
        data = made(pairs([kind(number % 3) for number in range(12)]))
        assert data.class_names == ["0", "1", "2"] and data.labels.tolist() == [0, 1, 2] * 4

    @pytest.mark.parametrize(
        ("labels", "match"),
        [
            (
                [0, 1, 3] * 4,
                "expected labels 0 to C - 1 without gaps in the training set, got 3 labels up to 3, and no 2;",
            ),
            (
                [-1, 0, 1] * 4,
                "without gaps in the training set, got 3 labels up to 1, and -1; number the classes from 0",
            ),
            ([0] * 12, "expected two or more classes in the training set, got 1; add"),
            (
                [0, "a", 1] * 4,
                "expected either class indices or class names as the labels of the training set, got both",
            ),
            (
                [0.5, 1, 2] * 4,
                "expected a class index or a class name .* of the training set, got another value in row 0;",
            ),
        ],
    )
    def test_others_are_refused(self, labels: list[Any], match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            made(pairs(labels)).setup()
        assert "\n" not in str(error.value)


class TestNamedColumns:
    def test_are_found(self) -> None:
        dataset = rows()
        data = made(dataset)
        assert data.class_names == ["ant", "bee", "cat"] and data.labels.tolist() == [0, 1, 2] * 4
        assert data.image_size == (SIDE, SIDE) and dataset.decoded < 2 * 12
        assert torch.equal(images_of(data), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))

    def test_a_list_of_mappings(self) -> None:
        data = made([{"image": image, "label": label} for image, label in pairs()])
        assert data.labels.tolist() == [0, 1, 2] * 4

    def test_are_chosen_by_key(self) -> None:
        more = {"fine": [0, 1] * 6, "mask": [Image.fromarray(pixels) for pixels in PIXELS]}
        with pytest.raises(
            ValueError, match="expected one column of images in the training set, got img, mask; set image_key"
        ):
            made(rows(**more))
        with pytest.raises(
            ValueError, match=r"one column of class indices 'no' .*, got the columns img, label, fine, mask; set"
        ):
            made(rows(**more), image_key="img", label_key="no")
        assert made(rows(**more), image_key="img", label_key="fine").labels.tolist() == [0, 1] * 6

    def test_several_integers_are_ambiguous(self) -> None:
        row = [{"image": image, "label": label, "id": 7} for image, label in pairs()]
        with pytest.raises(ValueError, match=r"expected one column of class indices .*, got label, id; set label_key"):
            made(row)


class TestSplits:
    def test_classes_are_matched_by_name(self) -> None:
        other = rows(names=("cat", "ant", "bee"))
        data = made(rows(), test=other)
        data.setup()
        assert data.table("test").labels.tolist() == [2, 0, 1] * 4 and data.test_names == ["test"]

    def test_an_unknown_class_is_named(self) -> None:
        with pytest.raises(
            ValueError, match=r"among the 3 training classes in the test set, got 4 others \(first: 'dog'\); correct"
        ):
            made(rows(), test=rows(names=("ant", "dog", "cat"))).setup()
        with pytest.raises(
            ValueError, match=r"training classes in the validation set, got 1 others \(first: 3\); correct"
        ):
            made(pairs(), val=pairs([3, *[0, 1, 2] * 3, 0, 1])).setup()

    def test_a_class_that_the_test_set_lacks_is_named(self) -> None:
        with pytest.warns(
            UserWarning, match="of all 3 classes in the test split, got none of 'bee'; its accuracy is that of"
        ):
            made(Stored(), test=pairs([0, 2] * 6)).setup()

    def test_without_another_set_a_part_is_held_out(self) -> None:
        data = FromDataset(pairs([0, 1] * 6), seed=0, holdout_fraction=0.25)
        assert data.num_samples == 9 and data.eval_names == ["val"]

    @pytest.mark.parametrize("dataset", [{"train": pairs()}, iter(pairs())], ids=["mapping", "iterator"])
    def test_what_is_no_data_set(self, dataset: Any) -> None:
        with pytest.raises(
            ValueError, match=r"expected a map-style data set for the training set, .* got .*; pass one split"
        ):
            made(dataset)

    @pytest.mark.parametrize(
        ("dataset", "match"),
        [
            ([], "expected one or more rows in the training set, got none"),
            (
                list(PIXELS),
                r"expected rows \(image, label\), or with named columns, in the training set, got ndarray; wrap",
            ),
            (
                [("a.png", 0), ("b.png", 1)],
                "expected a PIL image, an array or a tensor in row 0 of the training set, got str; convert the images, or use",
            ),
        ],
    )
    def test_rows_of_another_form(self, dataset: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            made(dataset)


class TestTrueLabels:
    clean = [0, 1, 2] * 3 + [1, 2, 0]

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_are_kept_apart(self, kind: Any) -> None:
        data = made(pairs(), true_labels=kind(self.clean))
        assert data.labels.tolist() == [0, 1, 2] * 4 and data.true_labels.tolist() == self.clean
        assert data.measured_noise_rate == 0.25

    def test_are_those_of_a_column_by_name(self) -> None:
        data = made(rows(clean=["abc"[label] for label in self.clean]), true_labels="clean")
        with pytest.raises(ValueError, match=r"training classes in true_labels, got 12 others \(first: 'a'\)"):
            data.setup()
        names = ("ant", "bee", "cat")
        data = made(rows(clean=[names[label] for label in self.clean]), true_labels="clean")
        assert data.true_labels.tolist() == self.clean

    def test_stay_true_under_injected_noise_and_splits(self) -> None:
        data = FromDataset(pairs(), true_labels=self.clean, noise=Noise("pair", 1.0), val_fraction=0.25, seed=0)
        both = {name: data.table(name) for name in ("train", "val")}
        origin = torch.cat([table.origin for table in both.values()])
        true = torch.cat([table.true_labels for table in both.values() if table.true_labels is not None])
        assert true[origin.argsort()].tolist() == self.clean

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ([0, 1], "expected 12 true labels, one per training image, got 2; pass all"),
            ([3] * 12, "training classes in true_labels, got 12 others"),
            ("nothing", "expected a column or an attribute 'nothing' of the training set, got none in list; check"),
        ],
    )
    def test_others_are_refused(self, given: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            made(pairs(), true_labels=given).setup()


class TestCommandLine:
    def test_a_data_set_by_class_path_in_gray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One channel from the data through the network, SANM's fill and its reconstruction; streamed by a worker."""
        monkeypatch.setattr(sys, "argv", ["sanm"])
        cli = main([
            "fit", "--data", "FromDataset", "--data.train", "torchvision.datasets.FakeData", "--data.train.size", "24",
            "--data.train.image_size", "[3, 20, 16]", "--data.train.num_classes", "3", "--data.channels", "1",
            "--data.resident_bytes", "0", "--data.num_workers", "1", "--data.batch_size", "8", "--model", "CrossEntropy",
            "--model.network", "small_cnn", "--model.network_args", "{width: 4}", "--model.sanm", "SANM",
            "--model.sanm.ratio", "fixed", "--model.warmup_epochs", "0", "--trainer.max_epochs", "1",
            "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", "--trainer.default_root_dir", "here",
        ])  # fmt: skip
        assert cli.model.hparams["network_args"] == {"width": 4, "in_chans": 1}
        assert cli.model.sanm.decoder.image_channels == 1 and cli.model.network.mean.shape == (1, 1, 1)
        with open("here/results.json") as file:
            assert json.load(file)["masked_steps"] > 0
        assert torchvision.datasets.FakeData(24, (3, 20, 16), 3)[5][1] == cli.datamodule._source("train").labels[5]


def test_a_wrapped_set_counts_its_rows() -> None:
    assert len(WrappedSet(pairs(), "training")) == 12
