"""Which room may import which: the shape of the package, kept by a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sanm_lightning"
OURS = "sanm_lightning"
ALLOWED = {
    "batch.py": set(),
    "random_streams.py": set(),
    "per_sample.py": {"random_streams"},
    "sanm": {"random_streams", "per_sample", "sanm"},
    "data": {"batch", "data", "safe_files"},
    "models": {"models"},
    "methods": {"batch", "per_sample", "random_streams", "sanm", "models", "methods"},
}
FOREIGN = {
    "sanm": {"torchvision"},
    "data": {"timm"},
    "models": {"lightning"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module)
    return names


def files(room: str) -> list[Path]:
    return [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).glob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_what_it_may(room):
    for path in files(room):
        names = imported(path)
        inside = {name.split(".")[1] for name in names if name.startswith(OURS + ".")}
        assert inside <= ALLOWED[room], path
        assert not {name.split(".")[0] for name in names} & FOREIGN.get(room, set()), path


def test_the_mathematics_knows_no_trainer():
    for path in files("sanm"):
        if path.stem not in ("mixin", "callback"):
            assert not any(name.startswith("lightning") for name in imported(path)), path


def test_no_file_of_sanm_names_a_method():
    methods = {path.stem for path in files("methods")} - {"__init__", "base", "schedules"}
    assert methods
    for path in files("sanm"):
        words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        camel = {"".join(part.title() for part in method.split("_")) for method in methods}
        assert not words & camel, path


def test_the_ban_itself_works(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import lightning as L\nfrom sanm_lightning.methods.base import NoisyLabelModule\n")
    assert imported(bad) == {"lightning", "sanm_lightning.methods.base"}
