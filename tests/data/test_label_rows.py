"""Label files whose rows name their samples: matched, checked, and samples dropped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_lightning.data import FromDataset, ImageFolder, Noise, Toy
from sanm_lightning.data.label_rows import read_label_file
from tests.data.test_image_folder import SIDE, folder

NAMES = ["cat", "dog", "=x"]
PATHS = ["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/c/'q.png"]
GIVEN = torch.tensor([0, 0, 1, 2])


def read(path: Path, text: str, names: list[str] = NAMES, paths: list[str] | None = PATHS, **options: Any) -> Any:
    path.write_text(text, encoding="utf-8")
    labels, kept = read_label_file(path, GIVEN, names, paths, **options)
    return labels.tolist(), kept.tolist()


class TestCSV:
    def test_rows_in_any_order_by_path(self, tmp_path: Path) -> None:
        text = "path,label\n./train/c/'q.png,'=x\ntrain/b/0.png,cat\ntrain/a/1.png,dog\ntrain/a/0.png,cat\n"
        assert read(tmp_path / "a.csv", text) == ([0, 1, 0, 2], [True] * 4)

    def test_rows_by_index_where_there_are_no_files(self, tmp_path: Path) -> None:
        text = "index,label,drop\n3,cat,0\n1,,1\n2,=x,\n0,dog,False\n"
        assert read(tmp_path / "a.csv", text, paths=None) == ([1, 0, 2, 0], [True, False, True, True])
        assert read(tmp_path / "a.csv", text) == ([1, 0, 2, 0], [True, False, True, True])

    def test_labels_as_class_indices(self, tmp_path: Path) -> None:
        text = "index,given,new_label\n0,0,2\n1,0,1.0\n2,1, 0\n3,2,1\n"
        assert read(tmp_path / "a.csv", text)[0] == [2, 1, 0, 1]

    def test_numbers_that_are_names_are_names(self, tmp_path: Path) -> None:
        text = "index,label\n0,10\n1,2\n2,2\n3,7\n"
        assert read(tmp_path / "a.csv", text, names=["2", "7", "10"])[0] == [2, 0, 0, 1]
        with pytest.raises(ValueError, match=r"among the 3 classes \(2, 7, 10\) in .* got 1 others, such as '1'"):
            read(tmp_path / "a.csv", text.replace("7", "1"), names=["2", "7", "10"])

    @pytest.mark.parametrize(
        ("header", "key", "labels"),
        [
            ("label,new_label", None, [1] * 4),
            ("labels,label", None, [1] * 4),
            ("label,new_label", "label", [0] * 4),
            ("noisy,label", "noisy", [0] * 4),
        ],
    )
    def test_the_column_of_labels(self, tmp_path: Path, header: str, key: str | None, labels: list[int]) -> None:
        text = f"path,{header}\n" + "".join(f"{path},cat,dog\n" for path in PATHS)
        assert read(tmp_path / "a.csv", text, key=key)[0] == labels

    def test_the_only_other_column_and_none(self, tmp_path: Path) -> None:
        rows = "".join(f"{path},cat,0\n" for path in PATHS)
        assert read(tmp_path / "a.csv", "path,noisy,drop\n" + rows)[0] == [0] * 4
        with pytest.raises(
            ValueError, match=r"labels under one of new_label, label, labels in .* got path, noisy, split"
        ):
            read(tmp_path / "a.csv", "path,noisy,split\n" + rows)
        with pytest.raises(ValueError, match=r"labels under 'z' in .* got path, noisy, split; set the key"):
            read(tmp_path / "a.csv", "path,noisy,split\n" + rows, key="z")

    def test_rows_of_other_splits_are_passed_over(self, tmp_path: Path) -> None:
        text = "path,label\ntest/a/0.png,nothing\n" + "".join(f"{path},cat\n" for path in PATHS)
        assert read(tmp_path / "a.csv", text, other_paths=["test/a/0.png"])[0] == [0] * 4
        with pytest.raises(ValueError, match="1 rows of unknown samples"):
            read(tmp_path / "a.csv", text)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            (
                "path,label\n",
                r"each of the 4 training samples in .*: ?.*4 samples without a row \(first: 'train/a/0\.png'\); use",
            ),
            (
                f"path,label\n{PATHS[0]},cat\n{PATHS[0]},cat\nx,cat\n{PATHS[1]},dog\n",
                r"2 samples without a row \(first: 'train/b/0\.png'\) and 1 rows of unknown samples \(first: 'x'\) and 1 rep",
            ),
            ("index,label\n0,cat\n1,cat\n2,bird\n3,fish\n", "got 2 others, such as 'bird', 'fish'; correct"),
            ("index,label\n0,cat\n1,\n2,cat\n3,cat\n", "got 1 others, such as ''"),
            ("index,label\n0,0\n1,1\n2,2\n3,3\n", "got 1 others, such as '3'"),
            (
                "index,label,drop\n0,cat,maybe\n1,cat,0\n2,cat,0\n3,cat,0\n",
                "in the column 'drop' .* got 1 others, such as 'maybe'",
            ),
            ("index,label,drop\n0,cat,1\n1,cat,1\n2,cat,1\n3,cat,1\n", "got all 4 dropped"),
            ("path;label\nx;cat\n", "file separated by commas in .*, got semicolons; save it as 'CSV UTF-8 "),
            ("index,label\n0,cat\n1\n", "expected 2 columns in .* got 1 in row 2"),
        ],
    )
    def test_refuses_with_one_sentence(self, tmp_path: Path, text: str, match: str) -> None:
        match = match.replace(".*: ?.*", ".*")
        with pytest.raises(ValueError, match=match) as error:
            read(tmp_path / "a.csv", text)
        assert "\n" not in str(error.value)

    def test_paths_for_a_set_without_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a column 'index' in .* got 'path'"):
            read(tmp_path / "a.csv", "path,label\nx,cat\n", paths=None)


class TestNPZ:
    def test_by_path_or_index_with_names_of_its_own(self, tmp_path: Path) -> None:
        labels = np.array([1, 0, 0, 2])
        order = [3, 1, 0, 2]
        for name in ("paths", "index"):
            where = np.array(PATHS)[order] if name == "paths" else np.array(order)
            arrays: dict[str, Any] = {name: where, "labels": labels[order]}
            np.savez(tmp_path / "a.npz", **arrays)
            assert read_label_file(tmp_path / "a.npz", GIVEN, NAMES, PATHS).labels.tolist() == [1, 0, 0, 2]
            np.savez(
                tmp_path / "a.npz", **arrays, class_names=np.array(["dog", "=x", "cat"]), drop=np.array([1, 0, 0, 0])
            )
            found = read_label_file(tmp_path / "a.npz", GIVEN, NAMES, PATHS)
            assert found.labels.tolist() == [2, 1, 1, 0] and found.kept.tolist() == [True, True, True, False]
        assert read_label_file(tmp_path / "a.npz", GIVEN, ["0", "1", "2"], PATHS).labels.tolist() == [1, 0, 0, 2]
        np.savez(tmp_path / "a.npz", **arrays, class_names=np.array(["dog", "bird", "cat"]))
        with pytest.raises(ValueError, match="got 1 others, such as 'bird'"):
            read_label_file(tmp_path / "a.npz", GIVEN, NAMES, PATHS)

    def test_sizes_that_do_not_fit(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", index=np.arange(4), labels=np.arange(3))
        with pytest.raises(ValueError, match="one label per entry of 'index'"):
            read_label_file(tmp_path / "a.npz", GIVEN, NAMES, PATHS)

    def test_never_unpickles(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", index=np.arange(4), labels=np.array([object()] * 4))
        with pytest.raises(ValueError, match="cannot be read"):
            read_label_file(tmp_path / "a.npz", GIVEN, NAMES, PATHS)


class TestInADataModule:
    def test_labels_of_a_run_are_read_back_by_path(self, tmp_path: Path) -> None:
        root = str(folder(tmp_path / "data", {"a": 3, "b": 3}))
        options: dict[str, Any] = {"image_size": SIDE, "holdout_fraction": 0, "seed": 1}
        noisy = ImageFolder(root, noise=Noise("symmetric_exclusive", 0.5), **options)
        noisy.save_labels(tmp_path / "labels.npz")
        again = ImageFolder(root, noise=Noise("file", path=str(tmp_path / "labels.npz")), **options)
        assert torch.equal(again.labels, noisy.labels) and again.noise_kind == "file"

    @pytest.mark.parametrize("files", [True, False])
    def test_labels_of_a_run_with_a_held_out_split_are_read_back(self, tmp_path: Path, files: bool) -> None:
        root = str(folder(tmp_path / "data", {"a": 8, "b": 8}))

        def data(noise: Noise, **options: Any) -> ImageFolder | Toy:
            return ImageFolder(root, noise=noise, image_size=SIDE, **options) if files else Toy(noise=noise, **options)

        run = data(Noise("symmetric", 0.5, seed=1), seed=0, val_fraction=0.25, max_train_samples=12)
        run.save_labels(tmp_path / "labels.npz")
        again = data(Noise("file", path=str(tmp_path / "labels.npz")), seed=0, holdout_fraction=0)
        both = [run.table(split) for split in ("train", "val")]
        order = torch.cat([table.origin for table in both]).argsort()
        assert torch.equal(again.table("train").origin, torch.cat([table.origin for table in both])[order])
        assert torch.equal(again.labels, torch.cat([table.labels for table in both])[order])
        with pytest.raises(ValueError, match="without a row"):  # the true labels of the others are not in the file
            data(Noise("file", path=str(tmp_path / "labels.npz"), key="true_labels"), seed=0).table("train")

    def test_labels_of_the_original_set_without_dropped_samples_are_read_back(self, tmp_path: Path) -> None:
        root = str(folder(tmp_path / "data", {"a": 4, "b": 4}))
        rows = [f"train/{name}/{i}.png,{'ba'[i % 2]},{int((name, i) == ('a', 0))}" for name in "ab" for i in range(4)]
        (tmp_path / "first.csv").write_text("\n".join(["path,label,drop", *rows]))

        def data(file: str, **options: Any) -> ImageFolder:
            return ImageFolder(root, image_size=SIDE, seed=1, noise=Noise("file", path=str(tmp_path / file)), **options)

        first = data("first.csv", val_fraction=0.25)
        first.save_labels(tmp_path / "labels.npz", original=True)
        with np.load(tmp_path / "labels.npz") as file:
            assert len(file["labels"]) == len(file["paths"]) == len(file["index"]) == 7
            assert "train/a/0.png" not in file["paths"]
            assert file["other_paths"].tolist() == ["train/a/0.png"] and file["other_dropped"].tolist() == [True]
        again = data("labels.npz", holdout_fraction=0)
        assert again.sample_paths() == [row.split(",")[0] for row in rows[1:]]
        assert [again.class_names[label] for label in again.labels] == [row.split(",")[1] for row in rows[1:]]

    def test_labels_of_the_original_set_have_its_true_labels(self) -> None:
        true = torch.arange(12) % 3
        given = [2, *true.tolist()[1:]]
        dataset = [(Image.new("RGB", (SIDE, SIDE), (i, 0, 0)), label) for i, label in enumerate(given)]
        data = FromDataset(dataset, true_labels=true.tolist(), holdout_fraction=0, seed=0)
        for table in (data.table("train"), data.original_labels()):
            assert table.noise_rate == pytest.approx(1 / 12)

    def test_dropped_samples_are_not_trained_on(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = folder(folder(tmp_path / "data", {"a": 3, "b": 3}), {"a": 1, "b": 1}, "test")
        rows = ["path,label,drop", "train/a/0.png,b,0", "train/a/1.png,a,1", "train/a/2.png,a,0"]
        rows += ["train/b/0.png,b,0", "train/b/1.png,,1", "train/b/2.png,a,0", "test/a/0.png,a,0"]
        (tmp_path / "labels.csv").write_text("\n".join(rows))
        data = ImageFolder(
            str(root), image_size=SIDE, seed=1, noise=Noise("file", path=str(tmp_path / "labels.csv")), crop_padding=0
        )
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup("fit")
        assert f"labels of {tmp_path}/labels.csv: 2 of 6 differ from those of the data set, 2 left out" in caplog.text
        assert data.num_samples == 4 and data.labels.tolist() == [1, 0, 1, 0]
        assert data.sample_paths() == ["train/a/0.png", "train/a/2.png", "train/b/0.png", "train/b/2.png"]
        batch = data.batch("train", torch.arange(4))
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == [0, 2, 0, 2]

    def test_drops_come_before_the_subset_and_the_split(self, tmp_path: Path) -> None:
        rows = "".join(f"{i},{i % 4},{int(i < 32)}\n" for i in range(64))
        (tmp_path / "labels.csv").write_text("index,label,drop\n" + rows)
        noise = Noise("file", path=str(tmp_path / "labels.csv"))
        data = Toy(seed=0, noise=noise, max_train_samples=16, val_fraction=0.25)
        origin = torch.cat([data.table(split).origin for split in ("train", "val")])
        assert len(origin) == 16 and origin.min() >= 32 and data.labels.bincount().tolist() == [3] * 4
        assert data.sample_paths() is None
