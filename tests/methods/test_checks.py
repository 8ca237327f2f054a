"""Checks and batches that methods share: ranges of arguments, empty selections, batches with balanced classes."""

import warnings

import pytest
import torch

from sanm_lightning.batch import EpochPlan
from sanm_lightning.methods.batches import balanced_batches
from sanm_lightning.methods.checks import RANGES, check_choice, check_range, nonempty_selection

ACCEPTED = {  # of these values
    "in [0, 1]": [0.0, 0.5, 1.0],
    "in [0, 1)": [0.0, 0.5],
    "in (0, 1]": [0.5, 1.0],
    "in (0, 1)": [0.5],
    "in [-1, 1]": [-0.5, 0.0, 0.5, 1.0],
    "> 0": [0.5, 1.0, 2.0],
    ">= 0": [0.0, 0.5, 1.0, 2.0],
    ">= 1": [1.0, 2.0],
}


@pytest.mark.parametrize("bounds", RANGES)
def test_values_out_of_a_range_are_refused(bounds):
    for value in (-0.5, 0.0, 0.5, 1.0, 2.0, float("nan")):
        if value in ACCEPTED[bounds]:
            check_range(bounds, alpha=value)
            continue
        with pytest.raises(ValueError) as error:
            check_range(f"{bounds} or null", alpha=value)
        assert str(error.value) == f"expected alpha {bounds} or null, got {value!r}; use the default"


def test_each_argument_is_checked_and_null_only_where_it_is_in_the_range():
    check_range(">= 1 or null", first=None, second=1)
    with pytest.raises(ValueError, match=r"expected second >= 1 or null, got 0; use the default"):
        check_range(">= 1 or null", first=None, second=0)
    with pytest.raises(ValueError, match=r"expected first >= 1, got None; use the default"):
        check_range(">= 1", first=None)


def test_other_values_than_the_choices_are_refused():
    check_choice(("hard", "soft"), first="hard", second="soft")
    with pytest.raises(ValueError, match=r"^expected second 'hard' or 'soft', got 'no'; choose one of them$"):
        check_choice(("hard", "soft"), first="hard", second="no")
    with pytest.raises(ValueError, match=r"^expected views 1 or 2, got 3; choose one of them$"):
        check_choice((1, 2), views=3)


def test_an_empty_selection_is_replaced_by_all_samples_with_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = torch.tensor([True, False, True])
        assert torch.equal(nonempty_selection(chosen, 3, "MOIT"), chosen)
    sentence = "^expected a selection with samples in epoch 3 of MOIT, got an empty one; training on all samples$"
    with pytest.warns(UserWarning, match=sentence):
        assert nonempty_selection(torch.zeros(3, dtype=torch.bool), 3, "MOIT").tolist() == [True] * 3


def test_balanced_batches_draw_each_class_with_members_equally_often():
    members = torch.tensor([2, 3, 5, 7, 11, 13])
    labels = torch.tensor([0, 0, 0, 0, 2, 0])  # class 1 has no members
    plan = EpochPlan(0, 500, 99, 20, 0, 1, lambda _: members)
    rows = balanced_batches(plan, members, labels, 3, 4, torch.Generator().manual_seed(0))
    assert rows.shape == (500, 4)
    drawn = [rows.flatten().tolist().count(int(member)) / 2000 for member in members]
    assert drawn == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.5, 0.1], abs=0.04)
