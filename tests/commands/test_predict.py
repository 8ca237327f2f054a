"""``sanm predict``: of images alone, and of a data module."""

import csv
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import CrossEntropy, NoisyDataModule, SANMMixin
from sanm_lightning.class_names import class_names_of
from sanm_lightning.cli import entry_point
from sanm_lightning.commands.predict import main, predict
from sanm_lightning.csv_tables import unescape_cell
from sanm_lightning.data import ImageFolder, Toy
from sanm_lightning.models import SmallCNN
from sanm_lightning.predictions import PredictionRecord
from sanm_lightning.predictor import _decode_size, load_method, load_predictor
from tests.commands.conftest import NamedToy, fitted
from tests.methods.test_every_method import SMALL
from tests.methods.toy import trainer

NAMES = ["=cat", 'do"g', "a,b", "käse"]
HEADER = ["path", "predicted_label", "confidence", *(f"p_{name}" for name in NAMES), "error"]


def read(path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, [dict(zip(header, map(unescape_cell, row), strict=True)) for row in rows]


def picture(path: Path, seed: int, size=(20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def images(tmp_path) -> Path:
    """Nested, unlabelled images with a formula for a name, a broken one, and a file that is none."""
    for seed, name in enumerate(["x.png", "a/=y.png", "a/b/z.jpg"]):
        picture(tmp_path / "images" / name, seed)
    (tmp_path / "images" / "broken.png").write_bytes(b"nonsense")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def test_images_alone(trained, images, tmp_path, capsys):
    path = str(trained("CrossEntropy")[1])
    assert (
        main(
            [
                "--ckpt_path",
                path,
                "--images",
                str(images),
                "--out",
                "pred.csv",
                "--num_workers",
                "0",
                "--batch_size",
                "2",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "1 file skipped (1 extension .txt unknown to Pillow)" in said and "skipped notes.txt" in said
    assert "unreadable: broken.png (cannot identify image file)" in said
    assert "3 images predicted, 1 unreadable (column error): pred.csv" in said
    header, rows = read("pred.csv")
    assert header == HEADER
    assert [row["path"] for row in rows] == ["a/=y.png", "a/b/z.jpg", "broken.png", "x.png"]
    broken = rows.pop(2)
    assert broken.pop("error") == "cannot identify image file"
    assert set(broken.values()) == {"broken.png", ""}
    for row in rows:
        values = [float(row[f"p_{name}"]) for name in NAMES]
        assert sum(values) == pytest.approx(1, abs=1e-5)
        assert row["predicted_label"] == NAMES[int(np.argmax(values))]
        assert float(row["confidence"]) == max(values)
        assert row["error"] == ""


def test_a_batch_without_a_readable_image(trained, images):
    assert predict(str(trained("CrossEntropy")[1]), [str(images)], "pred.csv", batch_size=1, num_workers=0) == 0
    assert [row["path"] for row in read("pred.csv")[1] if row["error"]] == ["broken.png"]
    assert sum(row["predicted_label"] != "" for row in read("pred.csv")[1]) == 3


def test_cells_that_look_like_formulas_are_escaped(trained, images):
    picture(images / "=z.png", 3)
    predict(str(trained("CrossEntropy")[1]), [str(images)], "pred.csv", num_workers=0)
    with open("pred.csv", newline="", encoding="utf-8") as file:
        cells = {cell for row in csv.reader(file) for cell in row}
    assert "'=z.png" in cells
    assert not any(cell.startswith("=") for cell in cells)


def test_files_and_folders_together_and_workers(trained, images):
    path = str(trained("DivideMix")[1])
    predict(path, [str(images / "x.png"), str(images / "a"), str(images / "x.png")], "some.csv", num_workers=2)
    rows = read("some.csv")[1]
    assert [row["path"] for row in rows] == [(images / name).as_posix() for name in ("x.png", "a/=y.png", "a/b/z.jpg")]
    predict(path, [str(images)], "all.csv", num_workers=0)
    of_all = {row.pop("path"): row for row in read("all.csv")[1]}
    assert all(of_all[Path(row.pop("path")).relative_to(images).as_posix()] == row for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Class folders with odd sizes, decoded at 24 and cut to 16 pixels."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 5), ("test", 3)):
        for label, name in enumerate("pqrs"):
            for number in range(count):
                picture(root / split / name / f"{number}.png", 100 * label + number, (21 + number, 37))
    return root


def test_images_are_prepared_as_the_data_module_of_the_training_does(folder, tmp_path):
    data = ImageFolder(str(folder), image_size=16, decode_size=24, batch_size=8, seed=0)
    fitted("CrossEntropy", tmp_path / "it.ckpt", data=data)
    found = load_method(tmp_path / "it.ckpt")
    assert (found.class_names, found.decode_size) == (list("pqrs"), 24)
    trainer(callbacks=[PredictionRecord()], default_root_dir=tmp_path).predict(found.module, data)
    predict(str(tmp_path / "it.ckpt"), [str(folder / "test")], "pred.csv", num_workers=0)
    header, of_data = read(tmp_path / "predictions.csv")
    assert header == ["path", "predicted_label", "confidence", "p_p", "p_q", "p_r", "p_s"]
    of_files = {row.pop("path"): row for row in read("pred.csv")[1]}
    assert len(of_data) == 12
    for row in of_data:
        other = of_files[row.pop("path").removeprefix("test/")]
        assert row["predicted_label"] == other["predicted_label"]
        for key in header[2:]:
            assert float(row[key]) == pytest.approx(float(other[key]), abs=2e-6)


@pytest.mark.parametrize(("channels", "resize"), [(1, "crop"), (3, "stretch"), (4, "stretch")])
def test_channels_and_resize_are_those_of_the_training(folder, tmp_path, channels, resize):
    data = ImageFolder(str(folder), image_size=16, channels=channels, resize=resize, batch_size=8, seed=0)
    network = {"network": "small_cnn", "network_args": {"width": 4, "in_chans": channels}}
    module = fitted("CrossEntropy", tmp_path / "a.ckpt", data=data, **network)
    assert load_method(tmp_path / "a.ckpt")[3:] == (resize, channels)
    predict(str(tmp_path / "a.ckpt"), [str(folder / "test")], str(tmp_path / "a.csv"), num_workers=0)
    expected = module(data.batch("test", torch.arange(data.split_size("test"))).images).softmax(1)
    rows = {row["path"]: [float(row[f"p_{name}"]) for name in "pqrs"] for row in read(tmp_path / "a.csv")[1]}
    found = [rows[path.removeprefix("test/")] for path in data.sample_paths("test")]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_a_predictor_in_python(trained):
    module, path = trained("CoTeaching")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        wanted = module(images / 255).softmax(1)
        found = load_predictor(path)(images)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_where_the_decode_size_is_looked_for():
    settings = {"settings": {"data": {"init_args": {"decode_size": 24}}}}
    assert _decode_size({**settings, "Toy": {"draws": 3, "decode_size": [28, 28]}}, (16, 16)) == 28
    assert _decode_size({**settings, "Toy": {"draws": 3}}, (16, 16)) == 24
    assert _decode_size({"settings": {"data": None}}, (16, 20)) == 20


class Foreign(SANMMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(3, 2)


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        Path("pred.csv").write_text("mine")
        yield
        assert Path("pred.csv").read_text() == "mine"
        assert not list(tmp_path.glob("*.tmp"))

    def refused(self, kind, words, path, given, out="new.csv", **options):
        with pytest.raises(kind, match=words):
            predict(str(path), [str(part) for part in given], out, num_workers=0, **options)
        assert not Path("new.csv").exists()

    def test_checkpoints(self, images, tmp_path, trained):
        self.refused(FileNotFoundError, "expected a checkpoint .* got no such file", "none.ckpt", [images])
        self.refused(ValueError, "expected a checkpoint", images / "broken.png", [images])
        torch.save({"state_dict": {}}, "weights.pt")
        self.refused(ValueError, "without epoch, global_step", "weights.pt", [images])
        run = trainer(1)
        run.strategy.connect(Foreign())
        run.save_checkpoint("foreign.ckpt")
        held = torch.load("foreign.ckpt", weights_only=True)
        torch.save({**held, "method": "mine"}, "strange.ckpt")
        self.refused(ValueError, "a method of this package", "strange.ckpt", [images])
        self.refused(ValueError, "a method of this package .* got one of another module", "foreign.ckpt", [images])
        fitted("CrossEntropy", "given.ckpt", network=SmallCNN(4, width=4), network_args=None)
        self.refused(ValueError, "expected a checkpoint with the name of its network", "given.ckpt", [images])
        self.refused(ValueError, "a trained classifier, got SimCLR", trained("SimCLR")[1], [images])

    def test_images(self, images, tmp_path, trained):
        path = trained("CrossEntropy")[1]
        self.refused(FileNotFoundError, "expected a folder or an image in 'none'", path, ["none"])
        (tmp_path / "empty").mkdir()
        self.refused(ValueError, "expected images in .*empty.*, got none", path, [tmp_path / "empty"])

    def test_outputs_and_numbers(self, images, tmp_path, trained):
        path = trained("CrossEntropy")[1]
        self.refused(
            FileExistsError, "expected a new file in 'pred.csv', got an existing file", path, [images], "pred.csv"
        )
        self.refused(IsADirectoryError, "expected a file name", path, [images], str(tmp_path), overwrite=True)
        self.refused(OSError, "got the file", path, [images], "pred.csv/more.csv")
        self.refused(ValueError, "expected batch_size of 1 or more", path, [images], batch_size=0)
        self.refused(ValueError, "expected a device such as cpu or cuda, got 'abacus'", path, [images], device="abacus")


def test_an_output_is_replaced_when_asked_for(images, trained):
    Path("pred.csv").write_text("old")
    predict(str(trained("CrossEntropy")[1]), [str(images)], "pred.csv", overwrite=True, num_workers=0)
    assert read("pred.csv")[0] == HEADER


def test_the_command_line_takes_over_only_where_images_are_given(monkeypatch, trained, images, capsys):
    monkeypatch.setattr(sys, "argv", ["sanm", "predict", "--ckpt_path", "none", f"--images={images}"])
    with pytest.raises(SystemExit, match="2"):
        entry_point()
    assert "expected a checkpoint in 'none'" in capsys.readouterr().err
    toy = ["--data", "Toy", "--data.num_test_samples", "6", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    small = ["--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}"]
    monkeypatch.setattr(sys, "argv", ["sanm", "predict", *small, *toy, *quiet, "--trainer.default_root_dir", "run"])
    entry_point()
    header, rows = read("run/predictions.csv")
    assert header == ["index", "predicted_label", "confidence", "p_0", "p_1", "p_2", "p_3"]
    assert [row["index"] for row in rows] == ["0", "1", "2", "3", "4", "5"]


class TestDataModules:
    def run(self, data, module=None, **options):
        module = CrossEntropy(**SMALL) if module is None else module
        record = trainer(callbacks=[PredictionRecord()], default_root_dir="run", **options)
        if isinstance(data, L.LightningDataModule):
            record.predict(module, data)
        else:
            record.predict(module, dataloaders=data)
        return Path("run/predictions.csv")

    def test_several_loaders_have_a_column_of_their_names(self):
        class Two(Toy):
            @property
            def test_names(self):
                return ["test", "val"]

        header, rows = read(self.run(Two(num_samples=40, num_test_samples=5, val_fraction=0.1, seed=1)))
        assert header[:2] == ["index", "set"]
        assert [row["set"] for row in rows] == ["test"] * 5 + ["val"] * 4
        data = Two(num_samples=40, val_fraction=0.1, seed=1)
        assert [row["index"] for row in rows[5:]] == list(map(str, data.table("val").origin.tolist()))

    def test_loaders_of_a_subclass_are_named_by_what_they_serve(self):
        images = torch.rand(3, 3, 16, 16)

        class Own(Toy):
            def predict_dataloader(self):
                return [DataLoader(TensorDataset(images), batch_size=3), self.pass_dataloader("train")]

        data = Own(num_samples=5, num_test_samples=9, val_fraction=0.2, seed=1)
        rows = read(self.run(data))[1]
        origin = map(str, data.table("train").origin.tolist())
        assert [(row["set"], row["index"]) for row in rows] == [
            *(("0", str(number)) for number in range(3)), *(("train", number) for number in origin),
        ]  # fmt: skip

    def test_columns_of_files_and_of_another_loader_have_empty_cells(self, folder):
        class Files(ImageFolder):
            def predict_dataloader(self):
                return [
                    self.pass_dataloader("train"),
                    DataLoader(TensorDataset(torch.rand(3, 3, 16, 16)), batch_size=3),
                ]

        data = Files(str(folder), image_size=16, batch_size=8, seed=0)
        header, rows = read(self.run(data))
        assert header[:3] == ["path", "set", "index"]
        assert [row["path"] for row in rows[:-3]] == data.sample_paths()
        assert [(row["path"], row["set"], row["index"]) for row in rows[-3:]] == [("", "1", str(n)) for n in range(3)]
        assert not any(row["index"] for row in rows[:-3])

    def test_loaders_of_any_kind_are_numbered(self):
        x, y = torch.rand(5, 3, 16, 16), torch.zeros(5, dtype=torch.int64)
        loaders = [DataLoader(TensorDataset(x, y), 2), DataLoader(TensorDataset(x[:3]), 2)]
        header, rows = read(self.run(loaders))
        assert header[:3] == ["index", "set", "predicted_label"]
        assert [(row["set"], row["index"]) for row in rows] == [
            *(("0", str(number)) for number in range(5)), *(("1", str(number)) for number in range(3)),
        ]  # fmt: skip

    def test_names_of_classes(self):
        assert read(self.run(NamedToy(num_test_samples=4)))[0][3:] == HEADER[3:-1]

    def test_an_earlier_table_is_kept(self):
        first = self.run(Toy(num_test_samples=4)).read_bytes()
        self.run(Toy(num_test_samples=5))
        assert Path("run/predictions.csv").read_bytes() == first
        assert len(read("run/predictions_1.csv")[1]) == 5

    def test_nothing_is_written_where_there_is_nothing_to_write(self):
        class Other(CrossEntropy):
            def predict_step(self, batch, batch_idx, dataloader_idx=0):
                return self(batch.images)

        assert not self.run(Toy(num_test_samples=4), Other(**SMALL)).exists()
        assert not self.run(Toy(num_test_samples=4), fast_dev_run=True).exists()

    def test_shares_of_several_processes_are_put_together(self, monkeypatch):
        """Two processes that were given one sample twice, as a sampler does that fills up the last batch."""

        class Rank:
            world_size, is_global_zero, fast_dev_run, datamodule = 2, True, False, None
            log_dir, default_root_dir, global_rank = None, "run", 0

        rows = torch.eye(4)[torch.arange(5) % 4]
        shares = []
        for rank, batches in enumerate(([[0, 2], [4]], [[1, 3], [0]])):
            record, run = PredictionRecord(), Rank()
            run.global_rank, run.is_global_zero = rank, rank == 0
            record.on_predict_start(run, None)
            for batch in batches:
                record.on_predict_batch_end(
                    run, None, {"index": torch.tensor(batch), "probabilities": rows[batch]}, None, 0
                )
            shares.append((record, run))

        def gather(into, mine):
            other = {0: tuple(np.concatenate(part) for part in zip(*shares[1][0]._parts[0], strict=True))}
            into[:] = [mine, other]

        monkeypatch.setattr("sanm_lightning.predictions.several_processes", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        shares[0][0].on_predict_end(shares[0][1], None)
        found = read("run/predictions.csv")[1]
        assert [row["index"] for row in found] == list("01234")
        assert [row["predicted_label"] for row in found] == list("01230")


class TestClassNames:
    def test_where_they_are_looked_for(self):
        hyper = {"num_classes": 2}
        state = {"draws": 3, "class_names": ["e", "f"]}
        assert class_names_of({"hyper_parameters": hyper}) == ["0", "1"]
        assert class_names_of({"hyper_parameters": hyper, "Toy": state}) == ["e", "f"]
        hyper["class_names"] = ["c", "d"]
        assert class_names_of({"hyper_parameters": hyper, "Toy": state}) == ["c", "d"]
        assert class_names_of({"hyper_parameters": hyper, "class_names": ["a", "b"]}) == ["a", "b"]

    def test_names_of_another_number_of_classes_are_passed_over(self):
        assert class_names_of({"hyper_parameters": {"num_classes": 2}, "class_names": ["a"]}) == ["0", "1"]

    def test_no_number_of_classes(self):
        with pytest.raises(ValueError, match="expected a checkpoint with a number of classes"):
            class_names_of({})


def test_the_base_says_what_a_data_module_needs():
    assert "decode_size" in NamedToy(seed=0).state_dict()
    assert issubclass(NamedToy, NoisyDataModule)
