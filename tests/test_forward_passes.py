"""The numbers of forward passes are those of the code, and every pass above the least has a reason."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest

from benchmarks.forward_passes import RESULTS, ROOT, least, measure
from scripts.gpu.cases import cases
from tests.full import FULL

ROWS = json.loads(RESULTS.read_text())["methods"]
CASES = list(cases())
COUNTED = [case for case in CASES if FULL or case.label in ("Mixup", "SANM(SELFIE)", "SANM(MCorrection)")]


def test_every_method_is_in_the_results():
    assert list(ROWS) == [case.label for case in CASES]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.label)
def test_the_results_are_those_of_the_code(case):
    assert measure(case) == ROWS[case.label]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_passes_above_the_least_have_a_reason(case):
    row = ROWS[case.label]
    assert row["least"] == list(least(case))
    above = [found - needed for found, needed in zip(row["passes"], row["least"], strict=True)]
    assert min(above) >= 0
    assert (max(above) > 0) is (row["reason"] is not None)


@pytest.mark.filterwarnings("ignore")
def test_the_example_of_the_page_prints_its_numbers():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "cost.md").read_text(), re.DOTALL)
    with redirect_stdout(io.StringIO()) as printed:
        exec(block, {})
    assert printed.getvalue().splitlines()[-1] == "[3.0, 4.0]"
