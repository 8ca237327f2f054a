"""Files that cannot be decoded: fatal, or left out before labels and splits are made, the same in every process and run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_lightning import CrossEntropy, CSVImages, FromDataset, ImageFolder, Noise
from sanm_lightning.data.decode import MAX_PIXELS
from tests.methods.toy import trainer

SIDE = 16


def pictures(root: Path, train: int = 8, test: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


def damage(root: Path) -> list[str]:
    """Damage four files in four ways."""
    paths = ["train/ant/0.png", "train/bee/3.png", "train/bee/4.png", "test/cat/1.png"]
    (root / paths[0]).write_bytes(b"")
    (root / paths[1]).write_bytes((root / paths[1]).read_bytes()[:200])
    (root / paths[2]).write_text("not an image")
    Image.new("1", (MAX_PIXELS // 4 + 1, 4)).save(root / paths[3])
    return paths


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), image_size=SIDE, crop_padding=0, batch_size=8, **{"seed": 3, **options})


class TestSkip:
    def test_bad_files_are_left_out_counted_and_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        bad = damage(pictures(tmp_path))
        data = folder(tmp_path, on_error="skip")
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup()
        lines = [record.message for record in caplog.records if "left out" in record.message]
        assert lines == [
            "train: 3 of 24 images left out as bad: train/ant/0.png (the file is empty), train/bee/3.png (image file is "
            "truncated), train/bee/4.png (cannot identify image file)",
            "test: 1 of 6 images left out as bad: test/cat/1.png (it has 16777217 x 4 pixels, more than 67,108,864)",
        ]
        assert data.num_samples == 21 and data.split_size("test") == 5
        assert not set(bad) & {*data.sample_paths(), *data.sample_paths("test")}

    def test_many_are_named_up_to_a_limit(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        pictures(tmp_path, train=14)
        for number in range(12):
            (tmp_path / f"train/ant/{number}.png").write_bytes(b"")
        with caplog.at_level("INFO", "lightning.pytorch"):
            folder(tmp_path, on_error="skip").setup()
        (line,) = (record.message for record in caplog.records if "left out" in record.message)
        assert line.count("the file is empty") == 10 and line.endswith("and 2 more; sanm check-data lists all")

    def test_the_rest_is_that_of_a_folder_without_them(self, tmp_path: Path) -> None:
        """Subset, noise, split and images, resident or streamed with workers: what every process and every resume finds."""
        options: dict[str, Any] = {
            "noise": Noise("symmetric_exclusive", 0.5),
            "max_train_samples": 18,
            "val_fraction": 0.2,
        }
        bad = damage(pictures(tmp_path))
        skipped = folder(tmp_path, on_error="skip", **options)
        streamed = folder(tmp_path, on_error="skip", resident_bytes=0, num_workers=1, **options)
        tables = [[data.table(split) for split in ("train", "val", "test")] for data in (skipped, streamed)]
        images = [data.store("train").look_up(torch.arange(data.num_samples)) for data in (skipped, streamed)]
        paths = [skipped.sample_paths(), streamed.sample_paths()]
        for path in bad:
            (tmp_path / path).unlink()
        without = folder(tmp_path, **options)
        assert paths[0] == paths[1] == without.sample_paths()
        for found, expected in zip(
            images, [without.store("train").look_up(torch.arange(without.num_samples))] * 2, strict=True
        ):
            assert torch.equal(found, expected)
        for found in tables:
            for one, name in zip(found, ("train", "val", "test"), strict=True):
                assert torch.equal(one.labels, without.table(name).labels)
                assert torch.equal(one.origin, without.table(name).origin)

    def test_a_resumed_run_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        damage(pictures(tmp_path / "data"))

        def run(epochs: int, **options: Any) -> Any:
            model = CrossEntropy(3, (SIDE, SIDE), network="small_cnn", network_args={"width": 4}, warmup_epochs=0)
            fit = trainer(epochs)
            torch.manual_seed(0)
            fit.fit(model, folder(tmp_path / "data", on_error="skip", resident_bytes=0), **options)
            return fit, model

        torch.manual_seed(0)
        whole = run(2)[1]
        torch.manual_seed(0)
        half = run(1)[0]
        half.save_checkpoint(tmp_path / "half.ckpt")
        resumed = run(2, ckpt_path=tmp_path / "half.ckpt")[1]
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    def test_a_file_that_went_bad_between_runs_stops_the_resume(self, tmp_path: Path) -> None:
        pictures(tmp_path / "data")
        model = CrossEntropy(3, (SIDE, SIDE), network="small_cnn", network_args={"width": 4}, warmup_epochs=0)
        fit = trainer(1)
        fit.fit(model, folder(tmp_path / "data", on_error="skip"))
        fit.save_checkpoint(tmp_path / "half.ckpt")
        damage(tmp_path / "data")
        with pytest.raises(
            ValueError, match="expected the training labels of the resumed run, got different labels; use"
        ):
            trainer(2).fit(model, folder(tmp_path / "data", on_error="skip"), ckpt_path=tmp_path / "half.ckpt")

    def test_a_class_without_readable_images_is_named(self, tmp_path: Path) -> None:
        for path in (pictures(tmp_path) / "train" / "bee").iterdir():
            path.write_bytes(b"")
        with pytest.raises(
            ValueError, match="readable images of every class in the train split, got none of 'bee'; replace"
        ):
            folder(tmp_path, on_error="skip").setup()

    def test_rows_of_a_data_set(self) -> None:
        class Broken(list[Any]):
            def __getitem__(self, row: Any) -> Any:
                if row == 3:
                    raise OSError("image file is truncated")
                return super().__getitem__(row)

        rows = Broken((np.full((8, 8, 3), number, np.uint8), number % 2) for number in range(8))
        rows.targets = [number % 2 for number in range(8)]  # type: ignore[attr-defined]
        with pytest.raises(
            ValueError, match=r"image in row 3 of the training set, .* decoded \(image file is truncated\)"
        ):
            FromDataset(rows, holdout_fraction=0).setup()
        data = FromDataset(rows, holdout_fraction=0, on_error="skip", true_labels=[0] * 8)
        images = data.store("train").look_up(torch.arange(data.num_samples))
        assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert data.labels.tolist() == [0, 1, 0, 0, 1, 0, 1] and data.true_labels.tolist() == [0] * 7

    def test_a_label_file_may_contain_them(self, tmp_path: Path) -> None:
        bad = damage(pictures(tmp_path / "data"))
        names = [f"train/{name}/{number}.png" for name in ("ant", "bee", "cat") for number in range(8)]
        (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{name},cat\n" for name in [*names, bad[3]]))
        noise = Noise("file", path=str(tmp_path / "labels.csv"))
        data = folder(tmp_path / "data", on_error="skip", noise=noise)
        assert data.labels.tolist() == [2] * 21


class TestRaise:
    def test_a_bad_file_is_fatal_by_default(self, tmp_path: Path) -> None:
        damage(pictures(tmp_path))
        with pytest.raises(
            ValueError, match=r"got '.*train/ant/0\.png', which cannot be decoded \(the file is empty\); rep"
        ):
            folder(tmp_path).setup()


class TestBadFiles:
    def test_listed_files_are_left_out_without_decoding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        damage(pictures(tmp_path))
        listed = "path,reason\ntrain/ant/0.png,a\ntrain/bee/3.png,b\ntrain/bee/4.png,c\ntest/cat/1.png,d\nother.png,e\n"
        (tmp_path / "bad.csv").write_text(listed)
        read: list[str] = []
        decode = Image.open
        monkeypatch.setattr(Image, "open", lambda path: (read.append(str(path)), decode(path))[1])
        data = folder(tmp_path, bad_files=str(tmp_path / "bad.csv"), resident_bytes=0)
        data.setup()
        assert data.num_samples == 21 and data.split_size("test") == 5 and not read

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (None, "expected a CSV file in .*bad.csv', got no such file"),
            ("a,b\n", "expected the header 'path,reason' in"),
        ],
    )
    def test_another_file_is_refused(self, tmp_path: Path, content: str | None, match: str) -> None:
        if content is not None:
            (tmp_path / "bad.csv").write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            folder(pictures(tmp_path), bad_files=str(tmp_path / "bad.csv")).setup()

    def test_listed_folders_are_left_out_as_classes_of_every_split(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for path in (pictures(tmp_path) / "train" / "ant").iterdir():
            path.unlink()
        (tmp_path / "test" / "cow").mkdir()
        (tmp_path / "bad.csv").write_text("path,reason\ntrain/ant,class without images\ntest/cow,class unknown\n")
        with pytest.raises(
            ValueError,
            match=r"expected images in '.*ant', got none \(empty folder\); add images, remove the folder, or list",
        ):
            folder(tmp_path).setup()
        data = folder(tmp_path, bad_files=str(tmp_path / "bad.csv"))
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup()
        assert data.class_names == ["bee", "cat"]
        assert data.num_samples == 16 and data.split_size("test") == 4
        assert data.labels.tolist() == [0] * 8 + [1] * 8
        assert "train: left out as bad: train/ant (class without images)" in caplog.messages
        assert (
            "test: left out as bad: test/ant (class unknown in training), test/cow (class unknown)" in caplog.messages
        )

    def test_a_listed_folder_with_images_again_is_a_class(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        listed = tmp_path / "bad.csv"
        listed.write_text("path,reason\ntrain/ant,class without images\ntrain/ant/0.png,the file is empty\n")
        data = folder(pictures(tmp_path), bad_files=str(listed))
        with caplog.at_level("INFO", "lightning.pytorch"):
            data.setup()
        assert data.class_names == ["ant", "bee", "cat"]
        assert data.labels.bincount().tolist() == [7, 8, 8]
        line = f"train: train/ant has images that are not listed in {listed}, and is kept; run sanm check-data again"
        assert caplog.messages.count(line) == 1

    def test_a_listed_folder_whose_images_are_all_listed_is_left_out(self, tmp_path: Path) -> None:
        rows = "".join(f"train/ant/{number}.png,the file is empty\n" for number in range(8))
        (tmp_path / "bad.csv").write_text(f"path,reason\n{rows}train/ant,class without readable images in train\n")
        data = folder(pictures(tmp_path), bad_files=str(tmp_path / "bad.csv"))
        assert data.class_names == ["bee", "cat"]

    def test_listed_rows_of_a_table_are_left_out(self, tmp_path: Path) -> None:
        pictures(tmp_path)
        rows = "".join(f"train/{name}/{number}.png,{name}\n" for name in ("ant", "bee") for number in range(8))
        (tmp_path / "my.csv").write_text(f"path,label\n{rows}gone.png,cow\n")
        (tmp_path / "bad.csv").write_text("path,reason\ngone.png,missing file\n")
        with pytest.raises(FileNotFoundError, match="got 1 missing files"):
            CSVImages(str(tmp_path / "my.csv"), image_size=SIDE, holdout_fraction=0).setup()
        data = CSVImages(
            str(tmp_path / "my.csv"), image_size=SIDE, holdout_fraction=0, bad_files=str(tmp_path / "bad.csv")
        )
        assert data.labels.tolist() == [0] * 8 + [1] * 8

    def test_of_a_table(self, tmp_path: Path) -> None:
        damage(pictures(tmp_path))
        rows = "".join(f"train/{name}/{number}.png,{name}\n" for name in ("ant", "bee") for number in range(8))
        (tmp_path / "my.csv").write_text("path,label\n" + rows)
        data = CSVImages(str(tmp_path / "my.csv"), image_size=SIDE, on_error="skip", holdout_fraction=0)
        assert data.labels.tolist() == [0] * 7 + [1] * 6
