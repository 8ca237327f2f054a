"""Losses, gradients, targets and selections equal those recorded from the code before the methods were rewritten (2888072).

The recording was made by the cases of ``recorded.py``, through an adapter to the interfaces of that commit.
"""

import json
from pathlib import Path

import pytest

from tests.full import FULL
from tests.methods.recorded import everything

RECORDING = {
    name: case
    for name, case in json.loads(Path(__file__).with_name("recording.json").read_text()).items()
    if FULL or name.split(" | ")[1] in ("alone", "sanm", "beginning")
}


@pytest.fixture(scope="module")
def found():
    return everything(FULL)


def differences(one, other, at: str = "") -> list[str]:
    if isinstance(one, dict):
        keys = [f"{at} {key}" for key in one.keys() ^ other.keys()]
        return keys + [d for key in one.keys() & other.keys() for d in differences(one[key], other[key], f"{at} {key}")]
    if isinstance(one, list) and len(one) == len(other):
        return [d for a, b in zip(one, other, strict=True) for d in differences(a, b, at)]
    close = other == pytest.approx(one, rel=1e-3, abs=2e-4)
    return [] if close else [f"{at}: {other} in place of {one}"]


def test_the_cases_are_those_of_the_recording(found):
    assert found.keys() == RECORDING.keys()


@pytest.mark.parametrize("case", RECORDING)
def test_a_step_is_the_recorded_one(case, found):
    assert not differences(RECORDING[case], found[case])
