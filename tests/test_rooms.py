"""Which room may import which: the shape of the package, kept by a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sanm_lightning"
OURS = "sanm_lightning"
ALLOWED = {
    "batch.py": set(),
    "class_names.py": set(),
    "random_streams.py": set(),
    "compat.py": set(),
    "epoch_means.py": {"compat"},
    "per_sample": {"per_sample", "random_streams"},
    "state_callback.py": {"per_sample"},
    "functional": {"functional"},
    "sanm": {"compat", "epoch_means", "functional", "models", "random_streams", "per_sample", "sanm", "state_callback"},
    "data": {"batch", "class_names", "csv_tables", "data", "random_streams", "safe_files"},
    "models": {"models", "safe_files"},
    "audit": {"audit", "csv_tables", "data", "functional", "models", "processing", "safe_files", "sanm"},
    "pictures": {
        "batch",
        "class_names",
        "data",
        "functional",
        "methods",
        "pictures",
        "random_streams",
        "safe_files",
        "sanm",
    },
    "study": {"cli", "command_line", "cost", "models", "pictures", "safe_files", "study"},
    "command_line": {"command_line", "commands", "sanm"},
    "run": {"audit", "callbacks", "class_names", "methods", "models", "run", "safe_files", "sanm"},
    "callbacks": {"batch", "callbacks", "class_names", "compat", "epoch_means", "random_streams"},
    "methods": {
        "batch",
        "callbacks",
        "class_names",
        "compat",
        "functional",
        "methods",
        "models",
        "per_sample",
        "random_streams",
        "sanm",
    },
}
HELPERS = {
    "__init__",
    "base",
    "batches",
    "checks",
    "ema",
    "evaluation",
    "feature_queue",
    "fine_tuned",
    "first_batch",
    "hooks",
    "learned",
    "momentum_contrast",
    "optimization",
    "passes",
    "probe_set",
    "reset",
    "schedules",
    "selected_contrast",
}
"""Files of methods/ that hold no method."""
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
    for path in [*files("sanm"), *files("functional")]:
        if path.stem not in ("mixin", "callback", "checks", "foreign_batch", "foreign_network", "rehearsal"):
            assert not any(name.startswith("lightning") for name in imported(path)), path


def test_no_file_of_sanm_names_a_method():
    methods = {path.stem for path in files("methods")} - HELPERS
    assert methods
    for path in files("sanm"):
        words = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        camel = {"".join(part.title() for part in method.split("_")) for method in methods}
        assert not words & camel, path


def test_the_ban_itself_works(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import lightning as L\nfrom sanm_lightning.methods.base import NoisyLabelModule\n")
    assert imported(bad) == {"lightning", "sanm_lightning.methods.base"}


def test_a_method_never_looks_for_the_data_module():
    for path in files("methods"):
        if path.stem not in HELPERS:
            assert "datamodule" not in path.read_text(), path


def test_only_one_file_relies_on_private_parts_of_lightning():
    for room in ("callbacks", "methods", "data"):
        for path in files(room):
            for private in ("fit_loop", "epoch_loop", "_data_source", "_logger_connector"):
                words = [
                    line for line in path.read_text().splitlines() if private in line and '["fit_loop"]' not in line
                ]
                assert not words, (path, words)
