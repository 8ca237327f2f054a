"""docs/own-data.md: its commands, configs and code run as written, on a small folder and with a small network."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import entry_point
from tests.data.test_left_out import pictures

PAGE = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "" for line in text.splitlines()]
YAML = {re.match(r"# (\S+)", text)[1]: text for kind, text in BLOCKS if kind == "yaml"}  # type: ignore[index]
(PYTHON,) = [text for kind, text in BLOCKS if kind == "python"]
SMALL = [
    "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--model.network", "small_cnn", "--data.batch_size", "8",
    "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", ".",
]  # fmt: skip
SIDE = ["--data.image_size", "16", "--data.decode_size", "16"]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run a command of the page in a folder with everything that it names."""
    pictures(tmp_path / "ROOT")
    shutil.copytree(tmp_path / "ROOT" / "test" / "ant", tmp_path / "FOLDER")
    rows = "".join(f"train/{name}/{number}.png,{name}\n" for name in ("ant", "bee", "cat") for number in range(8))
    (tmp_path / "images.csv").write_text("path,label\n" + rows)
    for name, text in YAML.items():
        (tmp_path / name).write_text(text)

    def run(command: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", [*command.split(), *more])
        entry_point()

    return run


def command(*words: str) -> str:
    """Return the only command of the page that contains all words."""
    (found,) = [line for line in COMMANDS if all(word in line for word in words)]
    return found


def results(version: int) -> dict:
    return json.loads(Path(f"lightning_logs/version_{version}/results.json").read_text())


def test_every_command_is_run_below() -> None:
    assert len(COMMANDS) == 9 and sorted(YAML) == ["augment.yaml", "select.yaml"]


def test_training_on_a_table(typed) -> None:  # type: ignore[no-untyped-def]
    typed(command("fit", "csv_images.yaml"), *SMALL, *SIDE)
    assert results(0)["sanm"] is True and results(0)["selected_on"] == "val"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning, when a selected checkpoint is tested
def test_check_selection_test_and_prediction(typed, capsys: pytest.CaptureFixture) -> None:  # type: ignore[no-untyped-def]
    typed(command("check-data ROOT"))
    typed(command("check-data --data"))
    assert capsys.readouterr().out.count("no bad files") == 2
    typed(command("fit", "configs/sanm.yaml", "--data.val_fraction"), *SMALL, *SIDE)
    assert results(0)["sanm"] is True and results(0)["selected_on"] == "val"
    typed(command("fit", "select.yaml"), *SMALL, *SIDE)
    assert results(1)["selected_on"] == "val" and results(1)["test_accuracy_last"] is None
    best = torch.load("lightning_logs/version_1/checkpoints/best.ckpt", weights_only=True)
    (stopping,) = [state for name, state in best["callbacks"].items() if name.startswith("EarlyStopping")]
    assert stopping["patience"] == 10 and float(stopping["best_score"]) == pytest.approx(
        results(1)["val_accuracy_best"]
    )
    typed(command("sanm test"), *SMALL[2:], *SIDE)
    typed(command("sanm predict"))
    assert Path("predictions.csv").read_text().count("\n") == 3


def test_the_transforms_of_torchvision(typed) -> None:  # type: ignore[no-untyped-def]
    typed(command("fit", "augment.yaml"), *SMALL, "--data.max_train_samples", "8", "--trainer.max_epochs", "1")
    assert results(0)["selected_on"] == "test"


def test_data_sets(typed) -> None:  # type: ignore[no-untyped-def]
    scope: dict = {}
    exec(PYTHON, scope)
    scope["data"].setup()
    assert scope["data"].num_samples == 60 and scope["model"].num_classes == 3
    more = [
        "--data.train.image_size",
        "[3, 16, 16]",
        "--data.train.num_classes",
        "2",
        "--trainer.limit_train_batches",
        "1",
    ]
    typed(command("FromDataset"), *SMALL, *more, "--trainer.max_epochs", "1")
    assert results(0)["epochs"] == 1
