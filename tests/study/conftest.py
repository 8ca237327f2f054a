"""Studies whose cells run a stub instead of ``sanm fit``, and a function that types a command."""

import sys
from pathlib import Path

import pytest
import yaml

from sanm_lightning.commands import run as command
from sanm_lightning.commands import study
from sanm_lightning.study import run

STUDY = {
    "methods": ["cross_entropy", "elr"],
    "sanm": ["base", "sanm"],
    "data": ["cifar10"],
    "noise": ["sym50"],
    "seeds": [1, 2],
    "options": {"trainer.max_epochs": 3},
}
OPEN_LOGS = pytest.mark.filterwarnings(  # submitit's debug executor leaves its log files open
    "ignore:Exception ignored in. <_io.FileIO name=.*_log.(out|err):pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a study with other keys and returns its path."""

    def make(**keys) -> str:
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **keys}))
        return str(path)

    return make


@pytest.fixture
def stubbed(monkeypatch):
    monkeypatch.setattr(run, "PROGRAM", (sys.executable, str(Path(__file__).with_name("stub.py"))))
    monkeypatch.setattr(study, "check_options", lambda name, cells: None)  # the stub has other options than sanm fit


@pytest.fixture
def typed(capsys):
    """Return a function that types a command and gives its exit status and what it prints."""

    def make(*words: str) -> tuple[int, str]:
        status = command(list(words))
        return status, capsys.readouterr().out

    return make
