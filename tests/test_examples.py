"""Every example runs, for an epoch on a few digits, and prints its one line."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers")


@pytest.mark.parametrize("name", ["plain_loop", "mixin", "callback"])
def test_runs_and_prints_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](epochs=1, samples=100)
    assert 0 <= accuracy <= 1
    assert capsys.readouterr().out.count("\n") == 1
