"""Images listed in a CSV file: columns of any name, labels of any kind, a sentence for every fault."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_lightning import CSVImages
from sanm_lightning.cli import main

SIDE = 8


def images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(root / name)


def table(path: Path, *rows: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def csv_images(file: str, **options: Any) -> CSVImages:
    return CSVImages(file, image_size=SIDE, crop_padding=0, flip=False, seed=0, **options)


class TestReads:
    def test_columns_of_any_name_and_paths_from_the_folder_of_the_file(self, tmp_path: Path) -> None:
        images(tmp_path, "x/0.png", "x/1.png", "2.png")
        file = table(
            tmp_path / "my.csv", "\ufeffsize,File name,What", '9,./2.png,"dog, wet"', "9,x/0.png, cat ", "9,x/1.png,cat"
        )
        data = csv_images(file, path_column="File name", label_column="What", holdout_fraction=0)
        assert (data.num_classes, data.class_names, data.image_size) == (2, ["cat", "dog, wet"], (SIDE, SIDE))
        assert data.labels.tolist() == [1, 0, 0] and data.true_labels is None
        assert data.sample_paths() == ["2.png", "x/0.png", "x/1.png"]
        batch = data.batch("train", torch.arange(3))
        assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == [2, 0, 1]

    def test_a_root_and_tabs(self, tmp_path: Path) -> None:
        images(tmp_path / "pictures", "0.png", "1.png")
        file = table(tmp_path / "tables" / "my.tsv", "path\tlabel", "0.png\ta,b", "1.png\tc")
        data = csv_images(file, root=str(tmp_path / "pictures"), holdout_fraction=0)
        data.setup()
        assert data.class_names == ["a,b", "c"]

    def test_absolute_paths_where_no_root_is_given(self, tmp_path: Path) -> None:
        images(tmp_path / "elsewhere", "0.png", "1.png")
        rows = [f"{tmp_path}/elsewhere/{number}.png,{number}" for number in (0, 1)]
        file = table(tmp_path / "my.csv", "path,label", *rows)
        data = csv_images(file, holdout_fraction=0)
        data.setup()
        assert data.sample_paths() == [f"{tmp_path}/elsewhere/0.png", f"{tmp_path}/elsewhere/1.png"]
        with pytest.raises(
            ValueError, match=r"relative to the root of .* got 2 absolute ones \(first: .*0\.png'\); omit"
        ):
            csv_images(file, root=str(tmp_path)).setup()

    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            (["10", "9", "-1", "9"], ["-1", "9", "10"]),
            (["10", "9", "b", "9"], ["10", "9", "b"]),
            (["1.5", "10.5", "2", "2"], ["1.5", "10.5", "2"]),
            (["0", "1", "2", "0"], ["0", "1", "2"]),
        ],
    )
    def test_whole_numbers_are_sorted_as_numbers_and_all_else_as_text(
        self, tmp_path: Path, labels: list[str], names: list[str]
    ) -> None:
        images(tmp_path, *(f"{number}.png" for number in range(4)))
        file = table(tmp_path / "my.csv", "path,label", *(f"{n}.png,{label}" for n, label in enumerate(labels)))
        data = csv_images(file, holdout_fraction=0)
        assert data.class_names == names
        assert [names[label] for label in data.labels] == labels

    def test_splits_in_any_case(self, tmp_path: Path) -> None:
        names = [f"{number}.png" for number in range(7)]
        images(tmp_path, *names)
        splits = ["TEST", "Train", "valid", "train", "Validation", "val", "test"]
        labels = "0120311"
        rows = [",".join(row) for row in zip(names, labels, splits, strict=True)]
        file = table(tmp_path / "my.csv", "path,label,split", *rows)
        data = csv_images(file, split_column="split")
        with pytest.raises(ValueError, match=r"the val rows of .* got 2 others \(first: '2' of '2\.png'\)"):
            data.setup()
        rows[2], rows[4] = "2.png,0,valid", "4.png,0,Validation"
        data = csv_images(table(tmp_path / "my.csv", "path,label,split", *rows), split_column="split")
        data.setup()
        assert data.eval_names == ["val", "test"] and data.test_names == ["test"]
        assert [data.sample_paths(split) for split in ("train", "val", "test")] == [
            ["1.png", "3.png"], ["2.png", "4.png", "5.png"], ["0.png", "6.png"]
        ]  # fmt: skip
        assert data.table("val").labels.tolist() == [0, 0, 1] and data.table("val").true_labels is None
        assert csv_images(data.file).own_splits == ()  # the column is not asked for

    def test_without_a_split_a_part_is_held_out(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        names = [f"{number}.png" for number in range(20)]
        images(tmp_path, *names)
        data = csv_images(table(tmp_path / "my.csv", "path,label", *(f"{name},{name[0]}" for name in names)))
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup()
        assert data.num_samples == 18 and data.labels.unique().tolist() == list(range(10))
        assert caplog.records[0].message == "train: 20 images of 10 classes"
        assert "2 training samples are held out" in caplog.records[1].message

    def test_test_rows_alone_can_be_tested_on(self, tmp_path: Path) -> None:
        images(tmp_path, "0.png", "1.png")
        data = csv_images(
            table(tmp_path / "my.csv", "path,label,part", "0.png,b,test", "1.png,a,test"), split_column="part"
        )
        data.setup("test")
        assert data.table("test").labels.tolist() == [1, 0]
        with pytest.raises(ValueError, match=r"expected rows of the train split in .*my\.csv', got none"):
            data.setup("fit")


class TestAnotherColumn:
    """A column that was chosen by mistake: its values are hardly ever repeated."""

    @pytest.mark.parametrize(("classes", "warned"), [(100, True), (80, True), (67, True), (66, False), (2, False)])
    def test_warns_if_most_labels_are_of_one_image(self, tmp_path: Path, classes: int, warned: bool) -> None:
        """100 images of ``classes`` labels, of which 100 - classes have two; or 50 each."""
        images(tmp_path, *(f"{number}.png" for number in range(100)))
        file = table(tmp_path / "my.csv", "path,width", *(f"{number}.png,{number % classes}" for number in range(100)))
        data = csv_images(file, label_column="width", holdout_fraction=0)
        if warned:
            with pytest.warns(
                UserWarning, match=f"one image for {2 * classes - 100} of the {classes} labels .*'width'"
            ):
                assert data.num_classes == classes
        else:
            assert data.num_classes == classes


class TestRefuses:
    @pytest.mark.parametrize(
        ("rows", "options", "match"),
        [
            ([], {}, "expected the columns path, label in .* got an empty file without path, label"),
            (
                ["path;label", "0.png;1"],
                {},
                "expected a CSV file separated by commas in .*, got semicolons; save it as 'CSV",
            ),
            (
                ["path\tlabel", "0.png\t1"],
                {},
                "expected a CSV file separated by commas in .*, got tabs; save it as 'CSV",
            ),
            (["path,label"], {}, "expected rows in .* got only a header"),
            (["a,b", "0.png,1"], {"path_column": "a"}, "columns a, label in .* got a, b without label; set"),
            (
                ["path,label", "0.png,1", "1.png"],
                {},
                r"2 columns in every row of .* got 1 other rows \(first: row 2 with 1\)",
            ),
            (
                ["path,label", "0.png,1", "1.png, ", "2.png,"],
                {},
                r"label in every row.* got 2 without \(first: '1\.png'\)",
            ),
            (["path,label", "0.png,1", ",1"], {}, r"a path in every row of .* got 1 without \(first: 'row 2'\)"),
            (
                ["path,label", "0.png,1", "./0.png,2"],
                {},
                r"one row per image of .* got 1 repeated ones \(first: '0\.png'\)",
            ),
            (
                ["path,label,s", "0.png,1,train", "1.png,1,dev", "2.png,1,eval"],
                {"split_column": "s"},
                "expected train, val or test in the column 's' of .* got 'dev', 'eval' in 2 rows",
            ),
            (
                ["path,label", *(f"{i}.png,{i}" for i in range(7))],
                {"split_column": "label"},
                r"got '0', '1', '2', '3', '4' and 2 more values in 7 rows; rename them, or omit split_column",
            ),
        ],
    )
    def test_with_one_sentence(self, tmp_path: Path, rows: list[str], options: dict[str, Any], match: str) -> None:
        images(tmp_path, "0.png", "1.png", "2.png")
        with pytest.raises(ValueError, match=match) as error:
            csv_images(table(tmp_path / "my.csv", *rows), **options).setup()
        assert "\n" not in str(error.value)

    def test_files_that_are_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected a CSV file in .* got none; check --data\.file"):
            csv_images(str(tmp_path / "my.csv")).setup()
        images(tmp_path, "0.png")
        file = table(tmp_path / "my.csv", "path,label", "0.png,1", "a.png,2", "b.png,2")
        with pytest.raises(FileNotFoundError, match=r"the 3 images .* got 2 missing files \(first: 'a\.png' in"):
            csv_images(file).setup()

    def test_other_text(self, tmp_path: Path) -> None:
        (tmp_path / "my.csv").write_bytes("path,label\n\u00e9.png,1\n".encode("latin-1"))
        with pytest.raises(ValueError, match=r"CSV file of UTF-8 text in .*; save it as UTF-8"):
            csv_images(str(tmp_path / "my.csv")).setup()


def test_the_command_line_trains_on_a_corrected_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sanm"])
    names = [f"images/{number}.png" for number in range(24)]
    images(tmp_path, *names)
    file = table(
        tmp_path / "my.csv", "path,label", *(f"{name},{'ab'[number % 2]}" for number, name in enumerate(names))
    )
    new = table(
        tmp_path / "new.csv", "path,label,drop", *(f"{name},b,{int(number < 4)}" for number, name in enumerate(names))
    )
    words = ["fit", "--config", "configs/method/cross_entropy.yaml", "--config", "configs/data/csv_images.yaml"]
    words += ["--data.file", file, "--data.image_size", "16", "--data.noise.kind", "file", "--data.noise.path", new]
    words += ["--model.network", "small_cnn", "--model.network_args", "{width: 4}", "--trainer.max_epochs", "1"]
    words += ["--model.warmup_epochs", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    words += ["--model.scheduler", "null", "--trainer.enable_model_summary", "false", "--trainer.logger", "CSVLogger"]
    words += ["--trainer.logger.save_dir", "runs"]
    cli = main(words)
    assert cli.datamodule.num_samples == 18 and cli.datamodule.labels.unique().tolist() == [1]
    results = json.loads((Path(cli.trainer.log_dir) / "results.json").read_text())
    assert results["val_accuracy_last"] is not None and results["test_accuracy_last"] is None
    saved = np.load(Path(cli.trainer.log_dir) / "labels.npz")
    assert saved["paths"].tolist() == cli.datamodule.sample_paths() and saved["class_names"].tolist() == ["a", "b"]
