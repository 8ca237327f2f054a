"""`sanm check-data`: every bad file with its reason, and an exit status for pipelines."""

import csv
import sys
from pathlib import Path

import pytest

from sanm_lightning.cli import entry_point
from sanm_lightning.commands.check_data import check_data, main
from sanm_lightning.data import ImageFolder
from tests.data.test_left_out import damage, pictures

EXPECTED = {
    "train/ant/0.png": "the file is empty",
    "train/bee/3.png": "image file is truncated",
    "train/bee/4.png": "cannot identify image file",
    "test/cat/1.png": "it has 16777217 x 4 pixels, more than 67,108,864",
}


def listed(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sanm", "check-data", *words])
        try:
            entry_point()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


class TestFolder:
    def test_a_good_folder(self, tmp_path: Path, typed, capsys: pytest.CaptureFixture) -> None:  # type: ignore[no-untyped-def]
        assert typed(str(pictures(tmp_path / "data")), "--num_workers", "0") == 0
        assert not Path("bad_files.csv").exists()
        assert capsys.readouterr().out.splitlines() == [
            "train: 24 images of 3 classes, 0 bad", "test: 6 images of 3 classes, 0 bad",
            "no bad files",
        ]  # fmt: skip
        assert typed(str(tmp_path / "data"), "--num_workers", "0", "--out", str(tmp_path / "bad.csv")) == 0
        assert listed(tmp_path / "bad.csv") == {}

    def test_the_default_file_is_written_where_something_is_bad(self, tmp_path: Path, typed) -> None:  # type: ignore[no-untyped-def]
        damage(pictures(tmp_path / "data"))
        assert typed(str(tmp_path / "data"), "--num_workers", "0") == 1
        assert listed(Path("bad_files.csv")) == EXPECTED

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_bad_files_and_their_reasons(self, tmp_path: Path, typed, workers: str) -> None:  # type: ignore[no-untyped-def]
        damage(pictures(tmp_path / "data"))
        assert typed(str(tmp_path / "data"), "--out", str(tmp_path / "bad.csv"), "--num_workers", workers) == 1
        assert listed(tmp_path / "bad.csv") == EXPECTED

    def test_the_list_leaves_out_what_skip_leaves_out(self, tmp_path: Path) -> None:
        damage(pictures(tmp_path / "data"))
        check_data(str(tmp_path / "data"), out=str(tmp_path / "bad.csv"), num_workers=0)
        listed_out, skipped = (
            ImageFolder(str(tmp_path / "data"), image_size=8, **options)
            for options in ({"bad_files": str(tmp_path / "bad.csv")}, {"on_error": "skip"})
        )
        assert listed_out.sample_paths() == skipped.sample_paths()
        assert listed_out.num_samples == 21

    def test_faults_of_the_folders(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        root = pictures(tmp_path / "data")
        (root / "train" / "empty").mkdir()
        (root / "test" / "bee").rename(root / "test" / "cow")
        (root / "train" / "ant" / "notes.txt").touch()
        (root / "train" / "ant" / "1.png").rename(root / "train" / "ant" / "2.PNG")
        for path in (root / "test" / "cat").iterdir():
            path.write_bytes(b"")
        assert check_data(str(root), out=str(tmp_path / "bad.csv"), num_workers=0) == 1
        assert listed(tmp_path / "bad.csv") == {
            "train/empty": "class without images",
            "test/cow": "class unknown in training",
            "test/cat/0.png": "the file is empty",
            "test/cat/1.png": "the file is empty",
            "cat": "class without readable images in test",
        }
        said = capsys.readouterr().out
        assert "train: 'train/ant/2.PNG' and 'train/ant/2.png' differ in case only" in said
        assert "train: 1 file skipped (1 extension .txt unknown to Pillow)\ntrain: skipped train/ant/notes.txt" in said
        assert "bad: train/empty (class without images)" in said

    def test_one_class(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        root = pictures(tmp_path / "data")
        (root / "train" / "ant").rename(tmp_path / "elsewhere")
        (root / "test" / "ant").rename(tmp_path / "elsewhere-too")
        assert check_data(str(root), num_workers=0) == 0
        for split in ("train", "test"):
            (root / split / "bee").rename(tmp_path / f"bee-{split}")
        assert check_data(str(root), num_workers=0) == 1
        assert capsys.readouterr().out.endswith("one class only; training requires two\n")


class TestTable:
    def test_every_fault_of_the_rows_at_once(self, tmp_path: Path) -> None:
        damage(pictures(tmp_path / "data"))
        (tmp_path / "my.csv").write_text(
            "path,label,split\ntrain/ant/0.png,ant,train\ntrain/ant/1.png,ant,train\ntrain/bee/0.png,bee,train\n"
            "train/ant/1.png,bee,train\n../x.png,ant,train\n/x.png,ant,train\ngone.png,ant,train\ntrain/ant/2.png,,train\n"
            "train/ant/3.png,ant,tset\ntest/ant/0.png,cow,test\ntest/ant/1.png,ant,test\n"
        )
        words = ["--data", "CSVImages", "--data.file", str(tmp_path / "my.csv"), "--data.root", str(tmp_path / "data")]
        words += ["--data.split_column", "split", "--out", str(tmp_path / "bad.csv"), "--num_workers", "0"]
        assert main(words) == 1
        assert listed(tmp_path / "bad.csv") == {
            "train/ant/0.png": "the file is empty",
            "train/ant/1.png": "repeated path",
            "../x.png": "path outside of the root",
            "/x.png": "absolute path",
            "gone.png": "missing file",
            "train/ant/2.png": "no label",
            "train/ant/3.png": "unknown split",
            "test/ant/0.png": "label 'cow' unknown in training",
        }

    def test_any_data_module_of_this_package(self, tmp_path: Path) -> None:
        data = ["--data", "FromDataset", "--data.train", "torchvision.datasets.FakeData", "--data.train.size", "12"]
        more = ["--data.train.image_size", "[3,8,8]", "--data.train.num_classes", "2"]
        assert main([*data, *more, "--out", str(tmp_path / "bad.csv"), "--num_workers", "0"]) == 0


class TestArguments:
    @pytest.mark.parametrize(
        ("words", "match"),
        [
            ([], "expected a folder or a data module, got neither; use"),
            (["data", "--data", "Digits"], "expected a folder or a data module, got both; use"),
            (["nowhere"], "expected a folder of class folders in 'nowhere', got no such folder; check"),
            (["data", "--num_workers", "-1"], "expected num_workers of 0 or more, got -1; use 0"),
            (
                ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"],
                "expected a data module with labels by",
            ),
        ],
    )
    def test_others_end_in_a_sentence_and_status_2(  # type: ignore[no-untyped-def]
        self, typed, capsys: pytest.CaptureFixture, words: list[str], match: str
    ) -> None:
        assert typed(*words) == 2
        assert match in capsys.readouterr().err
