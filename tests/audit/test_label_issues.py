"""The table of label issues and its file."""

import csv
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sanm_lightning.audit.label_issues import HEADER, LabelIssues, read_label_issues, write_label_issues
from sanm_lightning.csv_tables import escape_cell, unescape_cell

HARD = [
    "cat",
    '<script>alert("1")</script>',
    "a, b",
    "two\nlines",
    "=1+1",
    "'=1",
    "|",
    "a\\|b",
    "-1",
    "unreadable: x",
    "é ü",
    "\t",
    "c\r",
]


def table(**changes) -> LabelIssues:
    n, classes = 20, HARD
    draw = np.random.default_rng(0)
    content = {
        "paths": [f"train/{classes[i % len(classes)]}/{i}.png" for i in range(n)],
        "splits": ["train"] * 10 + ["test"] * 10,
        "given": np.arange(n) % len(classes),
        "suggested": draw.integers(0, len(classes), n),
        "quality": draw.random(n).round(6),
        "p_given": draw.random(n).round(6),
        "p_suggested": draw.random(n).round(6),
        "class_names": classes,
        "neighbor_labels": draw.integers(0, len(classes), (n, 5)),
    }
    return LabelIssues(**{**content, **changes})


def same(one: LabelIssues, other: LabelIssues, order: np.ndarray) -> None:
    readable = one.readable[order]
    for field in dataclasses.fields(LabelIssues):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("class_names", "unreadable") or a is None:
            continue
        a = [a[i] for i in order] if isinstance(a, list) else a[order]
        if field.name in ("suggested", "quality", "p_given", "p_suggested"):
            a, b = a[readable], b[readable]
        assert np.array_equal(a, b), field.name


class TestFile:
    def test_comes_back_worst_first(self, tmp_path):
        issues = table()
        write_label_issues(tmp_path / "l.csv", issues)
        back = read_label_issues(tmp_path / "l.csv", HARD)
        same(issues, back, issues.order())
        assert (np.diff(back.quality) >= 0).all()

    def test_has_the_header_and_ranks_from_one(self, tmp_path):
        write_label_issues(tmp_path / "l.csv", table())
        with (tmp_path / "l.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == HEADER
        assert [row[5] for row in rows[1:]] == [str(i) for i in range(1, 21)]
        assert all(len(row[4].split(".")[1]) == 6 for row in rows[1:])

    def test_positions_in_place_of_paths(self, tmp_path):
        issues = table(paths=None, index=np.arange(100, 120))
        write_label_issues(tmp_path / "l.csv", issues)
        assert (tmp_path / "l.csv").read_text().startswith("index,split")
        same(issues, read_label_issues(tmp_path / "l.csv", HARD), issues.order())

    def test_unreadable_files_are_at_the_end_with_their_reason(self, tmp_path):
        quality = table().quality.copy()
        quality[3] = np.nan
        issues = table(quality=quality, unreadable={3: "=truncated, \n at 7"})
        write_label_issues(tmp_path / "l.csv", issues)
        back = read_label_issues(tmp_path / "l.csv", HARD)
        assert back.unreadable == {19: "=truncated, \n at 7"}
        assert back.paths[19] == issues.paths[3]
        same(dataclasses.replace(issues, neighbor_labels=None), back, issues.order())

    def test_classes_are_those_that_occur_where_none_are_named(self, tmp_path):
        write_label_issues(tmp_path / "l.csv", table(neighbor_labels=None))
        back = read_label_issues(tmp_path / "l.csv")
        assert back.class_names == sorted(HARD)
        assert back.neighbor_labels is None

    def test_neighbors_may_be_fewer(self, tmp_path):
        near = table().neighbor_labels.copy()
        near[0, 2:] = -1
        write_label_issues(tmp_path / "l.csv", table(neighbor_labels=near))
        back = read_label_issues(tmp_path / "l.csv", HARD)
        assert np.array_equal(back.neighbor_labels, near[table().order()])

    def test_names_that_are_not_utf8(self, tmp_path):
        paths = [b"caf\xe9".decode("utf-8", "surrogateescape") + str(i) for i in range(20)]
        write_label_issues(tmp_path / "l.csv", table(paths=paths))
        assert sorted(read_label_issues(tmp_path / "l.csv").paths) == sorted(paths)

    def test_no_formula_starts_a_cell(self, tmp_path):
        write_label_issues(tmp_path / "l.csv", table())
        with (tmp_path / "l.csv").open(newline="") as file:
            assert not [
                cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))
            ]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="'=+-@\t\ra|\\,\"\n", max_size=6))
def test_escaping_is_reversible_and_leaves_no_formula(text):
    assert unescape_cell(escape_cell(text)) == text
    assert not escape_cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))


class TestRefuses:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"splits": ["train"]}, "expected 20 splits"),
            ({"given": np.full(20, 99)}, "given labels"),
            ({"suggested": np.full(20, -1)}, "suggested labels"),
            ({"quality": np.full(20, np.nan)}, "quality in"),
            ({"p_given": np.full(20, 1.1)}, "p_given in"),
            ({"neighbor_labels": np.full((20, 2), 99)}, "neighbor_labels in"),
            ({"paths": None}, "got neither"),
            ({"index": np.arange(20)}, "got both"),
            ({"paths": ["same"] * 20}, "each sample once"),
            ({"class_names": ["a"] * 13}, "unique class names"),
        ],
    )
    def test_columns_that_do_not_fit(self, changes, says):
        with pytest.raises(ValueError, match=says):
            table(**changes)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "empty file"),
            ("a,b\n1,2\n", "expected the header"),
            (",".join(HEADER) + "\nx,train,cat\n", "9 cells"),
            (",".join(HEADER) + "\nx,train,cat,dog,good,1,0.1,0.2,\n", "expected numbers"),
            (",".join(HEADER) + "\nx,train,cat,dog,7,1,0.1,0.2,\n", "quality in"),
            (",".join(HEADER) + '\nx,train,"cat"s,dog,7,1,0.1,0.2,\n', "expected a CSV file"),
        ],
    )
    def test_damaged_files(self, tmp_path, text, says):
        (tmp_path / "l.csv").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_label_issues(tmp_path / "l.csv")

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_label_issues(tmp_path / "l.csv")

    def test_another_class(self, tmp_path):
        write_label_issues(tmp_path / "l.csv", table())
        with pytest.raises(ValueError, match="12 others"):
            read_label_issues(tmp_path / "l.csv", ["cat"])
