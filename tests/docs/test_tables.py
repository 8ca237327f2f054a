"""The tables of measured numbers in README.md, docs/ and results/README.md are those of the files in results/."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "tables.py"))
TABLES, regenerated = SCRIPT["TABLES"], SCRIPT["regenerated"]
MEASURED = re.compile(
    r"\|[^|]*((?<![\w.])\.\d{3}\b|\d ± \d)"
)  # a cell with an accuracy, as in | .406 | or | 84.00 ± 5.37 |


@pytest.mark.parametrize("path", SCRIPT["pages"](), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_as_make_tables_writes_it(path):
    assert regenerated(path.read_text()) == path.read_text(), "run make tables"


def test_every_table_is_on_one_page():
    text = "".join(path.read_text() for path in SCRIPT["pages"]())
    assert sorted(re.findall("<!-- table: ([^ ]+) -->", text)) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_a_row_with_a_number(name):
    header, _, *rows = TABLES[name]().splitlines()
    assert rows and any(character.isdigit() for row in rows for character in row)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == header.count("|") for row in rows)


def test_accuracies_are_in_generated_tables():
    for path in SCRIPT["pages"]():
        outside = re.sub("<!-- table: .*?<!-- end -->", "", path.read_text(), flags=re.DOTALL)
        typed = [line for line in outside.splitlines() if line.startswith("|") and MEASURED.search(line)]
        assert not typed, path


def test_another_number_in_a_table_is_replaced_and_the_text_around_it_is_kept():
    page = "a .1\n\n<!-- table: million -->\n\n| 1 |\n\n<!-- end -->\n\nb .2 <!-- other -->\n"
    after = regenerated(page)
    assert after == f"a .1\n\n<!-- table: million -->\n\n{TABLES['million']()}\n\n<!-- end -->\n\nb .2 <!-- other -->\n"
    assert regenerated(after) == after


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- table: milion -->\n<!-- end -->", "expected a table of which-method, .*, got 'milion'; add it to"),
        ("<!-- table: million -->\n| 1 |\n", "expected '<!-- end -->' after each .*; add the end"),
    ],
)
def test_refuses(page, said):
    with pytest.raises(ValueError, match=said):
        regenerated(page)


def test_means_are_rounded_half_up_and_an_unmeasured_quantity_is_an_empty_cell():
    assert SCRIPT["mean"]([{"a": 0.5936}, {"a": 0.6294}], "a") == ".612"  # 0.6115
    assert SCRIPT["decimals"](0.0125) == ".013"
    assert SCRIPT["mean"]([{"a": None}], "a") == ""
    assert SCRIPT["decimals"](1.0) == "1.000"
