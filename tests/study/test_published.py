"""The published values: every table of the paper with its size and its sum, and a study for each."""

import pytest

from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.study.published import read_published
from sanm_lightning.study.schema import read_study

TABLES = {  # rows, columns, sum of the best and of the last accuracies, as added up from the paper
    "symmetric_noise": (14, 8, 7763.2, 0.0),
    "asymmetric_noise": (14, 2, 2101.7, 0.0),
    "clothing1m": (15, 1, 1099.02, 0.0),
    "pretrained_masks": (4, 8, 2617.5, 0.0),
    "components": (4, 8, 2546.4, 2535.9),
    "base_methods": (8, 8, 3601.0, 3324.2),
    "error_bars": (1, 8, 648.73, 0.0),
    "animal10n": (8, 1, 667.3, 0.0),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_the_rows_columns_and_sums_of_the_paper(table):
    values = read_published(table).values
    rows, columns, best, last = TABLES[table]
    assert len({key[:2] for key in values}) == rows
    assert len({key[2:] for key in values}) == columns
    for kind, total in (("best", best), ("last", last)):
        assert sum(value.get(kind, 0) for value in values.values()) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("table", TABLES)
def test_the_study_of_a_table_has_a_cell_for_each_value(table):
    study = read_study(packaged() / "configs" / "studies" / f"{table}.yaml")
    assert study.published == table
    planned = {
        (method, sanm, data, noise)
        for grid in study.grids
        for method in grid.methods
        for sanm in grid.sanm
        for data in grid.data
        for noise in grid.noise
    }
    assert set(read_published(table).values) <= planned


def test_values_that_two_tables_share_are_equal():
    """The components without and with SANM, the masks of SANM, and cross-entropy are those of Table 1."""
    first = read_published("symmetric_noise").values
    for table in ("components", "pretrained_masks", "base_methods"):
        both = {key: value for key, value in read_published(table).values.items() if key in first}
        assert len(both) in (8, 16)
        assert all(value["best"] == first[key]["best"] for key, value in both.items())


def test_the_values_of_gce_have_a_note():
    """They are not those of the method."""
    for table, count in (("symmetric_noise", 8), ("asymmetric_noise", 2), ("clothing1m", 1)):
        read = read_published(table)
        assert {key for key in read.values if key[0] == "gce"} == set(read.notes)
        assert len(read.notes) == count


def test_best_is_not_below_last():
    for table in ("components", "base_methods"):
        assert all(value["best"] >= value["last"] for value in read_published(table).values.values())


def test_an_unknown_table():
    with pytest.raises(
        ValueError, match="expected a table of published values, got 'symetric_noise'; near: symmetric_noise"
    ):
        read_published("symetric_noise")
