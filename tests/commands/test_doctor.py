"""sanm doctor: versions against the requirements, and the data sets of a folder."""

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from sanm_lightning.command_line.parsing import CommandParser
from sanm_lightning.commands import doctor, run
from sanm_lightning.data import __all__ as data_modules


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / name)


def data_lines(text: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("data ")]


@pytest.mark.parametrize("place", [".", "photos", "photos/train"])
def test_finds_class_folders_and_ends_with_status_0(tmp_path, capsys, place):
    touch(tmp_path / "photos", "train/ant/1.png", "train/ant/2.png", "train/bee/1.png")
    assert run(["doctor", "--data", str(tmp_path / place)]) == 0
    root = "photos/train" if place == "photos/train" else "photos"
    (line,) = data_lines(capsys.readouterr().out)
    assert line.startswith(f"ImageFolder in {tmp_path / root}: 2 classes, images: train 3: --config configs/data/")
    assert line.endswith(f"--data.root {tmp_path / root}")


def test_finds_the_official_layouts_beside_each_other(tmp_path, capsys):
    for name, paths in doctor.LAYOUTS.items():
        assert name in data_modules
        for path in paths:
            (tmp_path / name / path).mkdir(parents=True)
    touch(tmp_path, "photos/train/ant/1.png", "photos/train/bee/1.png")
    assert run(["doctor", "--data", str(tmp_path)]) == 0
    found = [line.partition(" in ")[0] for line in data_lines(capsys.readouterr().out)]
    assert sorted(found) == sorted([*doctor.LAYOUTS, "ImageFolder"])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            [],
            "expected class folders of images or the layout of a known data set in .*, got neither; see docs/own-data.md",
        ),
        (["ant/1.png"], "expected two or more classes in .*, got one; add a class folder"),
        (["train/ant/1.png", "train/bee/1.png", "test/cow/1.png"], "ImageFolder .*; faults: 1, see 'sanm check-data"),
    ],
    ids=["nothing", "one class", "unknown class"],
)
def test_ends_with_status_1_for_a_folder_without_usable_data(tmp_path, capsys, files, said):
    touch(tmp_path, *files)
    assert run(["doctor", "--data", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    (line,) = data_lines(out)
    assert line.startswith("FAULT: ")
    assert re.search(said, line)
    assert out.endswith("1 fault\n")


def test_refuses_a_folder_that_does_not_exist():
    with pytest.raises(
        NotADirectoryError, match="expected an existing folder for --data, got 'none'; choose the folder"
    ):
        run(["doctor", "--data", "none"])


def test_reports_missing_and_old_packages_as_faults_and_extras_without(monkeypatch, capsys):
    needed = ["torch>=2.6", "timm>=999", "absent>=1", "torch>=999; extra == 'new'", "numpy; extra == 'old'"]
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(line) for line in needed])
    assert run(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    torch_line, timm_line, absent_line = (
        next(line for line in lines if line.startswith(name)) for name in ("torch", "timm", "absent")
    )
    assert torch_line.split() == ["torch", doctor.version("torch")]
    assert "FAULT: expected timm>=999, got " in timm_line and timm_line.endswith("; pip install --upgrade 'timm>=999'")
    assert absent_line.split(maxsplit=1)[1] == "FAULT: expected absent>=1, got none; pip install 'absent>=1'"
    assert next(line for line in lines if line.startswith("[new]")).endswith(
        "not installed (torch); pip install 'sanm-lightning[new]'"
    )
    assert next(line for line in lines if line.startswith("[old]")).split() == ["[old]", "installed"]
    assert lines[-1] == "2 faults"


def test_runs_without_an_installed_package(monkeypatch, capsys):
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    assert run(["doctor"]) == 0
    assert "[test]" not in capsys.readouterr().out


def test_lists_every_device_and_names_small_shared_memory(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = type("Card", (), {"name": "Card", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 * 2**20}))
    run(["doctor"])
    out = capsys.readouterr().out
    assert [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("cuda:")] == [
        ["cuda:0", "Card, 80 GiB"],
        ["cuda:1", "Card, 80 GiB"],
    ]
    assert "0.1 GiB free" in out and "in a container set --shm-size" in out


def test_its_options_have_help():
    parser = CommandParser()
    parser.add_function_arguments(doctor.doctor, as_group=False)
    assert "Nothing is decoded or downloaded" in " ".join(parser.format_help().split())
