"""What people's folders and tables contain: each ends in a sentence, or is ignored and named."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sanm_lightning import CSVImages, ImageFolder

SIDE = 8


def images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(root / name)
    return root


def two_classes(root: Path, count: int = 3) -> Path:
    return images(root, *(f"train/{name}/{number}.png" for name in ("ant", "bee") for number in range(count)))


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), image_size=SIDE, seed=0, **{"holdout_fraction": 0, **options})


def table(place: Path, text: str, **options: Any) -> CSVImages:
    (place / "my.csv").write_text(text, encoding="utf-8")
    return CSVImages(str(place / "my.csv"), image_size=SIDE, seed=0, **{"holdout_fraction": 0, **options})


def sentence(data: Any, kind: type[Exception] = ValueError) -> str:
    """Return the one line that loading raises."""
    with pytest.raises(kind) as error:
        data.setup()
    said = str(error.value)
    assert "\n" not in said and said.startswith("expected ") and ", got " in said and "; " in said
    return said


def lines(data: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level("INFO", "lightning.pytorch"):
        data.setup()
    return [record.message for record in caplog.records]


class TestTables:
    def test_wrong_column_names(self, tmp_path: Path) -> None:
        said = sentence(table(tmp_path, "file,class\na.png,cat\n"))
        assert "the columns path, label in" in said and "got file, class without path, label; set path_column" in said

    def test_a_byte_order_mark_is_no_part_of_the_first_column(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "b.png")
        data = table(tmp_path, "\ufeffpath,label\na.png,cat\nb.png,dog\n")
        data.setup()
        assert (tmp_path / "my.csv").read_bytes().startswith(b"\xef\xbb\xbf")
        assert data.sample_paths() == ["a.png", "b.png"]

    @pytest.mark.parametrize("path", ["../a.png", "x/../../a.png"])
    def test_a_path_that_leaves_the_root(self, tmp_path: Path, path: str) -> None:
        images(tmp_path, "a.png", "root/b.png")
        said = sentence(table(tmp_path, f"path,label\n{path},cat\nb.png,dog\n", root=str(tmp_path / "root")))
        assert "paths inside of the root of" in said and "got 1 that leave it (first: '../a.png'); choose" in said

    def test_a_path_inside_of_the_root_by_a_detour(self, tmp_path: Path) -> None:
        images(tmp_path, "root/a.png", "root/b.png")
        data = table(tmp_path, "path,label\nx/../a.png,cat\nb.png,dog\n", root=str(tmp_path / "root"))
        data.setup()
        assert data.sample_paths() == ["a.png", "b.png"]

    def test_labels_with_gaps_are_names(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "b.png", "c.png")
        data = table(tmp_path, "path,label\na.png,10\nb.png,2\nc.png,7\n")
        assert data.class_names == ["2", "7", "10"] and data.labels.tolist() == [2, 0, 1]

    def test_one_class(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "b.png")
        said = sentence(table(tmp_path, "path,label\na.png,cat\nb.png,cat\n"))
        assert said == "expected two or more classes in the training set, got 1; add images of another class"

    def test_a_test_class_unknown_in_training(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "b.png", "c.png")
        rows = "path,label,split\na.png,cat,train\nb.png,dog,train\nc.png,cow,test\n"
        said = sentence(table(tmp_path, rows, split_column="split"))
        assert "labels of the test rows" in said and "got 1 others (first: 'cow' of 'c.png'); correct" in said

    def test_two_classes_of_one_name_in_another_case(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "b.png", "c.png")
        data = table(tmp_path, "path,label\na.png,Cat\nb.png,cat\nc.png,dog\n")
        with pytest.warns(
            UserWarning, match="expected class names that differ in more than case, got 'Cat' and 'cat'; ren"
        ):
            data.setup()
        assert data.class_names == ["Cat", "cat", "dog"]

    def test_two_files_of_one_name_in_another_case(self, tmp_path: Path) -> None:
        images(tmp_path, "a.png", "A.png")
        with pytest.warns(
            UserWarning, match="that differ in more than case, got 'a.png' and 'A.png'; rename one of them"
        ):
            table(tmp_path, "path,label\na.png,cat\nA.png,dog\n").setup()


class TestFolders:
    def test_one_class(self, tmp_path: Path) -> None:
        said = sentence(folder(images(tmp_path, "train/ant/1.png")))
        assert said.startswith("expected two or more classes in the training set, got 1;")

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_a_class_unknown_in_training(self, tmp_path: Path, split: str) -> None:
        said = sentence(folder(images(two_classes(tmp_path), f"{split}/ant/1.png", f"{split}/cow/1.png")))
        assert f"expected {split} classes among the 2 training classes, got 'cow'; rename or remove" in said

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_a_class_that_a_split_lacks(self, tmp_path: Path, split: str) -> None:
        data = folder(images(two_classes(tmp_path), f"{split}/ant/1.png"))
        with pytest.warns(UserWarning, match=f"of all 2 classes in the {split} split, got none of 'bee'; its accuracy"):
            data.setup()

    def test_loops_of_symbolic_links(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        two_classes(tmp_path)
        (tmp_path / "train" / "self").symlink_to(tmp_path / "train" / "self")
        (tmp_path / "train" / "up").symlink_to(tmp_path / "train")
        (tmp_path / "train" / "ant" / "top").symlink_to(tmp_path)
        (tmp_path / "train" / "ant" / "here").symlink_to(tmp_path / "train" / "ant")
        data = folder(tmp_path)
        said = lines(data, caplog)
        assert data.class_names == ["ant", "bee"]
        assert said[0] == (
            "train: 6 images of 2 classes, 4 files skipped (1 broken link, 1 folder listed before, 2 link to a folder above)"
        )
        assert all(name in said[1] for name in ("train/self", "train/up", "train/ant/here", "train/ant/top"))

    def test_an_unreadable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        two_classes(tmp_path)
        scan = os.scandir

        def refuse(path: Any) -> Any:
            if str(path).endswith("bee"):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)  # a superuser can read every folder
        said = sentence(folder(tmp_path), PermissionError)
        assert (
            "a readable folder in" in said
            and "bee', got Permission denied; change its permissions, or remove it" in said
        )

    def test_a_held_out_split_without_samples_of_a_class(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Every class stays in training; the classes that are too small for the other split are named."""
        images(two_classes(tmp_path, count=20), "train/rare/1.png")
        data = folder(tmp_path, val_fraction=0.2)
        said = lines(data, caplog)
        assert "held-out split 'val': no samples of 'rare', which have too few training samples" in said
        assert data.labels.bincount().tolist()[2] == 1

    def test_a_fraction_that_leaves_a_split_empty(self, tmp_path: Path) -> None:
        said = sentence(folder(two_classes(tmp_path, count=1), val_fraction=0.5))
        assert "a held-out fraction with samples in both splits, got 0.5, which gives 0 samples for validation" in said

    def test_two_files_of_one_name_in_another_case(self, tmp_path: Path) -> None:
        images(two_classes(tmp_path), "train/ant/0.PNG")
        with pytest.warns(
            UserWarning, match="got 'train/ant/0.PNG' and 'train/ant/0.png'; rename one of them, because"
        ):
            folder(tmp_path).setup()

    def test_a_class_folder_that_starts_with_a_dot_is_ignored_and_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        images(two_classes(tmp_path), "train/.cat/1.png")
        data = folder(tmp_path)
        assert lines(data, caplog)[:2] == [
            "train: 6 images of 2 classes, 1 file skipped (1 hidden)", "train: skipped train/.cat"
        ]  # fmt: skip
        assert data.class_names == ["ant", "bee"]

    @pytest.mark.parametrize("name", ["Thumbs.db", ".DS_Store", "desktop.ini"])
    def test_files_of_file_managers_are_ignored_and_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
    ) -> None:
        two_classes(tmp_path)
        for place in ("", "train/", "train/ant/"):
            (tmp_path / f"{place}{name}").write_bytes(b"x")
        said = lines(folder(tmp_path), caplog)
        assert said[0].startswith("train: 6 images of 2 classes, 3 files skipped (3 ")
        assert said[1] == f"train: skipped {name}, train/{name}, train/ant/{name}"

    def test_many_skipped_files_are_named_up_to_a_limit(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        two_classes(tmp_path)
        for number in range(13):
            (tmp_path / f"train/ant/{number}.txt").touch()
        said = lines(folder(tmp_path), caplog)
        assert said[1].count(".txt") == 10 and said[1].endswith(" and 3 more")
