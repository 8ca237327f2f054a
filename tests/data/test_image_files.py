"""Which files of a folder are images: nothing is left out unsaid, nothing hangs."""

import os
from pathlib import Path

import pytest

from sanm_lightning.data.image_files import count_passed_over, list_class_folder, list_images


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def listed(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    files, passed_over = list_class_folder(folder)
    return [path.relative_to(folder).as_posix() for path in files], {
        reason: [path.relative_to(folder).as_posix() for path in paths] for reason, paths in passed_over.items()
    }


class TestOneFolder:
    def test_sub_folders_are_walked_in_the_order_of_relative_paths(self, tmp_path: Path) -> None:
        touch(tmp_path, "b.png", "a/z.JPG", "a/deep/er/1.png", "a-b.png", "a.png")
        assert listed(tmp_path) == (["a-b.png", "a.png", "a/deep/er/1.png", "a/z.JPG", "b.png"], {})

    def test_everything_else_is_named_with_its_reason(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.png", "b.HEIC", "c", ".d.png", ".e/f.png", "g/notes.txt", "h.pdf", "g/.DS_Store")
        (tmp_path / "i.png").symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "k.png").symlink_to(tmp_path / "k.png")
        os.mkfifo(tmp_path / "j.png")
        files, passed_over = listed(tmp_path)
        assert files == ["a.png"]
        assert passed_over == {
            "extension .heic unknown to Pillow": ["b.HEIC"],
            "no extension": ["c"],
            "hidden": [".d.png", ".e/f.png", "g/.DS_Store"],
            "extension .txt unknown to Pillow": ["g/notes.txt"],
            "extension .pdf unknown to Pillow": ["h.pdf"],  # which Pillow can write, and not open
            "broken link": ["i.png", "k.png"],
            "not a file": ["j.png"],
        }

    def test_links_are_followed_and_loops_end(self, tmp_path: Path) -> None:
        touch(tmp_path, "elsewhere/1.png", "elsewhere/more/2.png", "class/z/3.png")
        here = tmp_path / "class"
        (here / "a.png").symlink_to(tmp_path / "elsewhere" / "1.png")
        (here / "linked").symlink_to(tmp_path / "elsewhere")
        (here / "z" / "up").symlink_to(here)
        (here / "again").symlink_to(here / "z")
        files, passed_over = listed(here)
        assert files == ["a.png", "linked/1.png", "linked/more/2.png", "z/3.png"]
        assert passed_over == {"folder listed before": ["again", "z/up"]}

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            list_class_folder(tmp_path / "nowhere")

    def test_a_phrase_counts(self, tmp_path: Path) -> None:
        touch(tmp_path, "a.png", "b", ".c", ".d")
        assert (
            count_passed_over(list_class_folder(tmp_path).passed_over) == "3 files skipped (2 hidden, 1 no extension)"
        )
        assert count_passed_over({"hidden": [Path("a")]}) == "1 file skipped (1 hidden)"
        assert count_passed_over({}) == ""


class TestRoot:
    def test_of_class_folders(self, tmp_path: Path) -> None:
        touch(tmp_path, "cat/2.png", "bee/x/1.png", "cat/1.png", "ant/.1.png", "README.md", "loose.png")
        found = list_images(tmp_path)
        assert [path.as_posix() for path in found.paths] == ["bee/x/1.png", "cat/1.png", "cat/2.png"]
        assert found.splits == ["all"] * 3 and found.class_names == ["ant", "bee", "cat"]
        assert found.labels.tolist() == [1, 2, 2]
        assert found.passed_over == {
            "extension .md unknown to Pillow": [Path("README.md")],
            "in no class folder": [Path("loose.png")],
            "hidden": [Path("ant/.1.png")],
        }

    def test_of_splits_with_classes_of_any(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/b/1.png", "train/a/1.png", "test/c/1.png", "valid/a/1.png", "train/x.png.txt")
        touch(tmp_path, "runs/a/1.png", "labels.csv")
        found = list_images(tmp_path)
        assert [path.as_posix() for path in found.paths] == [
            "train/a/1.png", "train/b/1.png", "valid/a/1.png", "test/c/1.png"
        ]  # fmt: skip
        assert found.splits == ["train", "train", "val", "test"]
        assert found.class_names == ["a", "b", "c"] and found.labels.tolist() == [0, 1, 0, 2]
        assert {reason: len(paths) for reason, paths in found.passed_over.items()} == {
            "extension .csv unknown to Pillow": 1,
            "folder of no split": 1,
            "extension .txt unknown to Pillow": 1,
        }

    def test_a_test_folder_without_classes_is_passed_over(self, tmp_path: Path) -> None:
        found = list_images(touch(tmp_path, "train/b/1.png", "train/a/1.png", "test/1.png", "test/2.png"))
        assert len(found.paths) == 2
        assert found.passed_over == {"in no class folder": [Path("test/1.png"), Path("test/2.png")]}

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/1.png", "bus/1.png")
        found = list_images(tmp_path)
        assert found.class_names == ["bus", "train"] and found.splits == ["all", "all"]
        touch(tmp_path, "train/night/2.png", "train/.thumbs/x.png")
        assert list_images(tmp_path).class_names == ["bus", "train"]

    @pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "Testing"), ("train", "validation")])
    def test_names_of_splits_are_no_classes(self, tmp_path: Path, train: str, test: str) -> None:
        found = list_images(touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{test}/b/1.png"))
        assert found.class_names == ["a", "b"]
        assert found.splits == ["train", "train", "val" if test == "validation" else "test"]

    def test_a_loose_image_in_train_makes_no_classes_of_the_splits(self, tmp_path: Path) -> None:
        touch(tmp_path, "train/loose.png", "train/a/1.png", "train/b/1.png", "test/a/1.png", "unlabeled/1.png")
        found = list_images(tmp_path)
        assert found.class_names == ["a", "b"] and found.splits == ["train", "train", "test"]
        assert found.passed_over == {
            "folder of no split": [Path("unlabeled")], "in no class folder": [Path("train/loose.png")],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("files", "match"),
        [
            ([], "expected class folders in .*, got none; "),
            (["loose.png"], "expected class folders in .*, got none; "),
            (["a/1.txt", "b/2"], r"expected images of two .*, got 0 of 0 \(2 files skipped"),
            (["a/1.png", "b/2"], r"got 1 of 1 \(1 file skipped \(1 no extension\)\); use"),
            (["train/a/1.png"], "got 1 of 1"),
            (["train/1.txt"], "expected class folders in .*train"),
        ],
    )
    def test_says_what_is_missing(self, tmp_path: Path, files: list[str], match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            list_images(touch(tmp_path, *files))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("others", [["test/a/1.png"], ["val/a/1.png", "test/a/2.png"]])
    def test_splits_without_a_training_set_are_no_classes(self, tmp_path: Path, others: list[str]) -> None:
        with pytest.raises(FileNotFoundError, match="expected a folder 'train'"):
            list_images(touch(tmp_path, *others))

    def test_no_such_root(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected a folder .*nowhere.*got no such folder; check"):
            list_images(tmp_path / "nowhere")
