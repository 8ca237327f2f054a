"""The commands of the pages on the quick start, the audit and label noise are run one after the other on small data."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sanm_lightning.cli import entry_point
from tests.data.test_left_out import pictures
from tests.docs.pages import blocks, commands, is_shell

FAST = [
    "--trainer.max_epochs",
    "1",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]
SMALL = [*FAST, "--trainer.accelerator", "cpu", "--model.network", "small_cnn", "--data.image_size", "16"]
DIGITS = [*FAST, "--trainer.accelerator", "cpu", "--model.network", "small_cnn", "--data.max_train_samples", "64"]


@pytest.fixture
def typed(monkeypatch):
    """Run a command of a page, found by its beginning, with more options and replaced words."""

    def run(page: str, start: str, *, more: tuple[str, ...] = (), **replaced: list[str]) -> None:
        lines = [line for block in blocks() if block.page == page and is_shell(block) for line in commands(block)]
        (found,) = {tuple(line) for line in lines if " ".join(line).startswith(start)}
        monkeypatch.setattr(sys, "argv", [*(part for word in found for part in replaced.get(word, [word])), *more])
        entry_point()

    return run


def test_the_quick_start(typed, capsys):
    page = "docs/quickstart.md"
    typed(page, "sanm doctor")
    assert "no faults" in capsys.readouterr().out
    typed(page, "sanm fit --config configs/quickstart.yaml --config configs/quickstart_sanm.yaml", more=(*DIGITS,))
    assert json.loads(Path("runs/digits/results.json").read_text())["sanm"] is True
    assert {path.name for path in Path("runs/digits").iterdir()} >= {"labels.npz", "label_issues.csv", "report.html"}
    log = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", ".")
    typed(page, "sanm fit --config configs/method/cross_entropy.yaml", more=(*DIGITS, *log))
    assert Path("lightning_logs/version_0/checkpoints/best.ckpt").is_file()
    typed(page, "sanm list noise")
    assert "configs/noise/sym50.yaml" in capsys.readouterr().out


def test_from_the_audit_over_corrections_to_a_training(typed):
    torch.manual_seed(0)
    torch.save(timm.create_model("small_cnn").state_dict(), "weights.pt")
    page = "docs/audit.md"
    network = ("--network", "small_cnn", "--checkpoint", "weights.pt", "--image_size", "16", "--cache", "cache")
    pictures(Path("ROOT"))
    for path in Path("ROOT").glob(
        "*/*/*.png"
    ):  # the classes have different brightness, one image that of another class
        shade = 2 if path.match("train/ant/0.png") else ("ant", "bee", "cat").index(path.parent.name)
        Image.fromarray(np.asarray(Image.open(path)) // 3 + np.uint8(85 * shade)).save(path)
    typed(page, "sanm audit ROOT --out audit", more=network)
    with open("audit/label_issues.csv", newline="") as file:
        (worst, *_) = csv.DictReader(file)
    assert Path("audit/report.html").is_file()
    (new,) = {"ant", "bee", "cat"} - {worst["given_label"]} - {"cat" if worst["given_label"] != "cat" else "ant"}
    Path("accepted.csv").write_text(
        f"path,split,given_label,verdict,new_label\n{worst['path']},{worst['split']},{worst['given_label']},wrong,{new}\n"
    )
    typed(page, "sanm relabel audit --accepted accepted.csv --out")
    assert f"{worst['path']},{worst['given_label']},{new},0" in Path("labels/changes.csv").read_text()
    typed(page, "sanm fit --config configs/image_folder.yaml --data.root", more=(*SMALL, "--trainer.logger", "false"))
    typed(page, "sanm audit --data ImageFolder --data.root ROOT --data.noise", more=network)
    masked = (*SMALL, "--model.warmup_epochs", "1", "--trainer.max_epochs", "2", "--trainer.logger", "false")
    typed(page, "sanm fit --config configs/image_folder.yaml --config configs/sanm/features.yaml", more=masked)
    assert json.loads(Path("results.json").read_text())["masked_steps"] > 0
    typed(page, "sanm relabel --undo")
    assert not Path("labels/labels.csv").exists()
    typed(page, "sanm relabel audit --below")
    typed(page, "sanm relabel audit --accepted accepted.csv --linked")
    assert sum(path.is_file() for path in Path("corrected").rglob("*.png")) == 30
    for block in blocks():
        if block.page == page and block.kind == "python":
            exec(block.text, {})
    assert "my images" in Path("report/report.html").read_text()


def test_label_noise_is_reported_saved_and_read(typed, capsys):
    page = "docs/options.md"
    typed(page, "sanm noise", CIFAR10=["Digits"], instance=["symmetric_exclusive"])
    assert "actual rate 0.4" in capsys.readouterr().out
    recipe = ["--config", "configs/method/cross_entropy.yaml", "--config", "configs/data/digits.yaml"]
    typed(page, "sanm fit ... --data.noise.kind file", more=(*DIGITS, "--trainer.logger", "false"), **{"...": recipe})
    assert json.loads(Path("results.json").read_text())["measured_noise_rate"] == pytest.approx(0.4, abs=0.15)
