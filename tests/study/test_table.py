"""The table of a study: means, published values, marks with reasons, what is missing; its formats and its figure."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from sanm_lightning.study.cells import cells_of
from sanm_lightning.study.figure import gain, gain_figure
from sanm_lightning.study.formats import FORMATS
from sanm_lightning.study.published import read_published
from sanm_lightning.study.record import Record
from sanm_lightning.study.schema import read_study
from sanm_lightning.study.state import State, write_state
from sanm_lightning.study.table import Row, rows_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(write):
    """Return a function that makes a study in ``out`` and its record, cells and published values."""

    def make(published="base_methods", **keys):
        keys = {"methods": ["cross_entropy", "elr_plus"], "options": {}, "published": published, **keys}
        read, record = read_study(write(**keys)), Record("out")
        cells = cells_of(read)
        record.write(read.name, read.published, cells)
        return record, cells, read_published(published) if published else None

    return make


def finish(record: Record, cell, best: float | None, **other) -> None:
    """Write the results of a finished cell."""
    last = None if best is None else round(best - 0.1, 4)
    results = {"epochs": cell.epochs, "seconds": 1800.0, "noise_kind": "symmetric", "test_accuracy_best": best,
               "test_accuracy_last": last, "val_accuracy_best": 0.7, "val_accuracy_last": 0.6, **other}  # fmt: skip
    record.folder(cell).mkdir(parents=True)
    (record.folder(cell) / "results.json").write_text(json.dumps(results))
    write_state(record.folder(cell), State("finished", attempts=1))


def finish_all(record, cells, **other) -> None:
    for cell in cells:
        finish(record, cell, 0.8 + 0.02 * cell.seed + (0.05 if cell.sanm == "sanm" else 0), **other)


class TestRows:
    def test_mean_spread_and_difference_from_the_published_value(self, study):
        record, cells, published = study()
        finish_all(record, cells)
        row = rows_of(record, cells, published)[0]
        assert (row.method, row.sanm, row.data, row.noise) == ("cross_entropy", "base", "cifar10", "sym50")
        assert row.mean("best") == pytest.approx(83) and row.mean("last") == pytest.approx(73)
        assert row.spread("best") == pytest.approx(2**0.5)  # of 82 and 84, divided by n - 1
        assert row.published == {"best": 79.4, "last": 57.9}
        assert row.difference("best") == pytest.approx(83 - 79.4)
        assert row.difference("last") == pytest.approx(73 - 57.9)
        assert (row.epochs, row.hours, row.missing, row.reasons) == ("300", 1.0, "", ())

    def test_cells_that_are_not_finished_are_named_and_are_no_part_of_the_mean(self, study):
        record, cells, published = study(methods=["cross_entropy"], seeds=[1, 2, 3])
        finish(record, cells[0], 0.9)
        record.folder(cells[1]).mkdir(parents=True)
        write_state(record.folder(cells[1]), State("failed", "expected memory, got none; buy some", 1))
        first, second = rows_of(record, cells, published)
        assert first.missing == "1 of 3 failed: expected memory, got none; buy some, 1 of 3 not run"
        assert first.mean("best") == pytest.approx(90) and first.spread("best") is None
        assert second.missing == "not run" and second.mean("best") is None

    @pytest.mark.parametrize(
        ("keys", "other", "reason"),
        [
            ({"options": {"trainer.max_epochs": 60}}, {}, "60 epochs instead of 300"),
            ({"options": {"data.max_train_samples": 5000}}, {}, "5000 training images"),
            ({"options": {"data.val_fraction": 0.2}}, {}, "other selection split (data.val_fraction 0.2)"),
            ({}, {"noise_kind": "file"}, "labels from a noise file"),
            ({}, {"epochs": 100}, "stopped after 100 of 300 epochs"),
            ({"options": {"model.network": "small_cnn"}}, {}, "other network (model.network small_cnn)"),
        ],
    )
    def test_a_row_that_is_not_comparable_has_a_reason_and_no_difference(self, study, keys, other, reason):
        record, cells, published = study(methods=["cross_entropy"], sanm=["base"], **keys)
        finish_all(record, cells, **other)
        (row,) = rows_of(record, cells, published)
        assert row.reasons == (reason,)
        assert row.published["best"] == 79.4 and row.difference("best") is None

    def test_a_run_that_stopped_early_is_marked_without_published_values_too(self, study):
        record, cells, _ = study(None, methods=["elr"], sanm=["base", "sanm"], seeds=[1])
        finish(record, cells[0], 0.9, epochs=40)
        finish(record, cells[1], 0.9)
        stopped, whole = rows_of(record, cells, None)
        assert stopped.reasons == ("stopped after 40 of 150 epochs",) and whole.reasons == ()

    def test_a_published_value_that_is_not_that_of_the_method_is_not_compared(self, study):
        record, cells, published = study(
            "clothing1m", methods=["gce"], data=["clothing1m"], noise=["none"], sanm=["base"]
        )
        finish_all(record, cells)
        (row,) = rows_of(record, cells, published)
        assert row.reasons == ("published value with SimCLR pre-training",)
        assert row.published["best"] == 73.3 and row.difference("best") is None

    @pytest.mark.parametrize("published", ["asymmetric_noise", None])
    def test_a_row_with_known_labels_is_marked_with_and_without_published_values(self, study, published):
        probe = {"ieg": {"model.probe": "probe.csv"}}
        record, cells, values = study(
            published, methods=["ieg", "elr"], noise=["asym40"], sanm=["base"], method_options=probe
        )
        finish_all(record, cells)
        with_labels, without = rows_of(record, cells, values)
        assert with_labels.reasons == ("true labels of a probe set are used",)
        assert with_labels.difference("best") is None and without.reasons == ()
        text = FORMATS["markdown"]([with_labels, without], None)
        assert "<sup>a</sup> not comparable: true labels of a probe set are used\n" in text

    def test_a_finished_cell_without_results_counts_as_interrupted(self, study):
        record, cells, _ = study()
        finish_all(record, cells)
        (record.folder(cells[0]) / "results.json").unlink()
        row = rows_of(record, cells, None)[0]
        assert row.missing.endswith("interrupted") and cells[0].seed not in row.best

    def test_without_a_test_accuracy_that_of_val_is_shown_and_not_compared(self, study):
        record, cells, published = study(methods=["cross_entropy"], sanm=["base"], seeds=[1])
        finish(record, cells[0], None)
        (row,) = rows_of(record, cells, published)
        assert (row.split, row.mean("best")) == ("val", 70)
        assert row.reasons == ("other selection split (accuracy on val, without a test set)",)

    def test_what_the_paper_does_not_give_has_no_published_value(self, study):
        record, cells, published = study(
            methods=["cross_entropy"], sanm=["features"], options={"trainer.max_epochs": 60}
        )
        finish_all(record, cells)
        (row,) = rows_of(record, cells, published)
        assert row.published == {} and row.reasons == ()

    def test_a_run_that_only_provides_a_pre_trained_network_is_left_out(self, study):
        record, cells, published = study(
            "symmetric_noise", methods=["c2d"], pretraining={"c2d": "simclr"}, sanm=["base"]
        )
        assert [row.method for row in rows_of(record, cells, published)] == ["c2d"]

    def test_a_run_that_also_provides_a_pre_trained_network_is_a_seed_of_its_row(self, study):
        keys = {
            "methods": ["cross_entropy", "c2d"],
            "noise": ["none", "sym50"],
            "pretraining": {"c2d": "cross_entropy"},
        }
        record, cells, _ = study(None, sanm=["base"], **keys)
        assert [row.seeds for row in rows_of(record, cells, None)] == [2] * 4


ROWS = [
    Row("cross_entropy", "base", "cifar10", "sym50", "", 2, {1: 79.0, 2: 81.0}, {1: 60.0, 2: 60.0},
        {"best": 79.4, "last": 57.9}, "300", 12.5, "test", "", ()),
    Row("cross_entropy", "sanm", "cifar10", "sym50", "", 2, {1: 85.0}, {1: 84.0}, {"best": 89.7}, "60", 0.25, "test",
        "1 of 2 failed: 50% a|b", ("60 epochs instead of 300", "5000 training images")),
]  # fmt: skip


def timed(run: int, *accuracies: float, machine: str = "one", evaluations: float = 1.0) -> dict:
    """The timing of a run with an evaluation every ``10 * run`` seconds of training."""
    times = [10.0 * run * number for number in range(1, 1 + len(accuracies))]
    return {"machines": [machine], "evaluation_seconds": evaluations, "epoch": [*range(1, 1 + len(accuracies))],
            "training_seconds": times, "test_accuracy": [*accuracies]}  # fmt: skip


class TestSecondsTo:
    def seconds(self, study, *, goal: float = 70.0, timings=(), **keys) -> str:
        """Return the last field of the first row, the seeds of which have these timings."""
        record, cells, _ = study(None, **{"methods": ["elr"], "sanm": ["base"], **keys})
        for cell, timing in zip(cells, timings, strict=True):
            finish(record, cell, 0.9, timing=timing)
        self.table = FORMATS["markdown"](rows_of(record, cells, None), None, goal)
        return self.table.splitlines()[2].split("|")[-2].strip()

    def test_are_those_of_the_first_evaluation_whose_mean_over_seeds_is_as_high(self, study):
        """Means .50, .70, .65, .90 after 15, 30, 45, 60 s."""
        timings = timed(1, 0.5, 0.8, 0.6, 0.9), timed(2, 0.5, 0.6, 0.7, 0.9)
        assert self.seconds(study, timings=timings) == "30.0"
        assert self.table.splitlines()[0].endswith("| hours | seconds to 70 % |")
        assert "Seconds to 70 %: training on one, with pre-training and without evaluations, until" in self.table

    def test_are_not_given_where_the_mean_stays_below(self, study):
        assert self.seconds(study, goal=80.0, timings=(timed(1, 0.5, 0.9), timed(1, 0.9, 0.5))) == "not reached"

    def test_are_those_of_epochs_that_all_seeds_evaluated(self, study):
        assert self.seconds(study, timings=(timed(1, 0.5, 0.9), timed(1, 0.9))) == "10.0"

    def test_of_an_earlier_version_are_unknown(self, study):
        assert self.seconds(study, timings=(timed(1, 0.9), None)) == "not recorded"

    def test_contain_the_pre_training_without_its_evaluations(self, study):
        """36 s of SimCLR, of which 6 s are evaluations, before 10 s."""
        record, cells, _ = study(None, methods=["c2d"], pretraining={"c2d": "simclr"}, sanm=["base"], seeds=[1])
        finish(record, cells[0], None, seconds=36.0, timing=timed(1, evaluations=6.0))
        finish(record, cells[1], 0.9, timing=timed(1, 0.8))
        (row,) = rows_of(record, cells, None)
        assert row.curve.seconds_to(70.0) == 40.0
        finish_again = {"epochs": 1, "seconds": 36.0, "test_accuracy_best": None, "val_accuracy_best": None}
        (record.folder(cells[0]) / "results.json").write_text(json.dumps(finish_again))
        assert rows_of(record, cells, None)[0].curve is None

    def test_name_the_machines_if_there_are_several(self, study):
        timings = timed(1, 0.9), timed(1, 0.9), timed(1, 0.9), timed(1, 0.9, machine="two")
        assert self.seconds(study, methods=["elr", "gce"], timings=timings) == "10.0 (machine 1)"
        assert self.table.splitlines()[3].endswith("| 10.0 (machine 1, 2) |")
        assert "training on 1: one; 2: two, with" in self.table and "not comparable between machines." in self.table

    def test_have_columns_in_csv(self, study):
        self.seconds(study, timings=(timed(1, 0.5, 0.8), timed(2, 0.5, 0.8)))
        rows = rows_of(Record("out"), Record("out").read()[2], None)
        for goal, seconds in ((70.0, "30"), (90.0, "")):
            (row,) = csv.DictReader(io.StringIO(FORMATS["csv"](rows, None, goal)))
            assert (row["seconds_to_accuracy"], row["seconds"], row["machines"]) == (f"{goal:g}", seconds, "one")

    def test_of_the_command_are_given_for_an_accuracy_between_0_and_1(self, study, typed):
        self.seconds(study, timings=(timed(1, 0.9), timed(1, 0.9)))
        assert "| 10.0 |" in typed("table", "out", "--seconds-to", "0.7")[1]
        with pytest.raises(
            ValueError, match=r"expected an accuracy in \(0, 1\] for --seconds-to, got 70; write \.9 for 90 %"
        ):
            typed("table", "out", "--seconds-to", "70")


class TestFormats:
    def test_markdown(self):
        lines = FORMATS["markdown"](ROWS, "Table 6").splitlines()
        assert lines[0] == (
            "| method | SANM | data | noise | seeds | best | published | difference | last | published | difference | epochs "
            "| hours |"
        )
        assert lines[2] == (
            "| cross_entropy | base | cifar10 | sym50 | 2 | 80.00 ± 1.41 | 79.4 | +0.60 | 60.00 ± 0.00 | 57.9 | +2.10 | 300 "
            "| 12.50 |"
        )
        assert lines[3] == (
            "| cross_entropy | sanm | cifar10 | sym50 | 1 of 2 | 85.00 (1 of 2 failed: 50% a\\|b) <sup>a</sup> | 89.7 |  "
            "| 84.00 |  |  | 60 | 0.25 |"
        )
        assert "Published: Table 6." in lines[5]
        note = "<sup>a</sup> not comparable: 60 epochs instead of 300, 5000 training images"
        assert lines[7] == note

    def test_columns_of_published_values_are_left_out_without_any(self):
        rows = [row.__class__(**{**vars(row), "published": {}, "reasons": ()}) for row in ROWS]
        for name in ("markdown", "latex"):
            assert "published" not in FORMATS[name](rows, None)

    def test_latex(self):
        text = FORMATS["latex"](ROWS, "Table 6")
        assert text.startswith("\\begin{tabular}{llllrrrrrrrrr}\n\\toprule\n")
        assert r"cross\_entropy & base & cifar10 & sym50 & 2 & 80.00 $\pm$ 1.41 & 79.4 & +0.60" in text
        assert r"85.00 (1 of 2 failed: 50\% a|b)\textsuperscript{a} &" in text
        assert r"\textsuperscript{a} not comparable: 60 epochs" in text

    def test_csv_has_each_value_in_a_column_of_its_own(self):
        first, second = csv.DictReader(io.StringIO(FORMATS["csv"](ROWS, "Table 6")))
        assert (first["best_mean"], first["best_published"], first["source"]) == ("80", "79.4", "Table 6")
        assert float(first["best_difference"]) == pytest.approx(0.6)
        assert (second["seeds_finished"], second["seeds"], second["best_spread"]) == ("1", "2", "")
        assert second["missing"] == "1 of 2 failed: 50% a|b"
        assert second["not_comparable"] == "60 epochs instead of 300; 5000 training images"


class TestFigure:
    def test_the_gain_is_the_mean_difference_of_equal_seeds(self):
        base = Row(
            *("elr", "base", "cifar10", "sym50", "", 3), {1: 70.0, 2: 80.0, 3: 90.0}, {}, {}, "1", 0, "test", "", ()
        )
        sanm = Row(*("elr", "sanm", "cifar10", "sym50", "", 3), {1: 72.0, 2: 84.0}, {}, {}, "1", 0, "test", "", ())
        mean, spread = gain(sanm, base)
        assert mean == 3 and spread == pytest.approx(2**0.5)
        assert gain(sanm, Row(**{**vars(base), "best": {3: 90.0}})) is None

    def test_shows_each_variant_and_the_published_gain(self):
        comparable = Row(**{**vars(ROWS[1]), "reasons": ()})
        (axis,) = gain_figure([ROWS[0], comparable]).axes
        marks = {line.get_label(): line.get_xdata()[0] for line in axis.lines if len(line.get_xdata()) == 1}
        assert marks["sanm, published"] == pytest.approx(89.7 - 79.4)
        assert [bar.lines[0].get_xdata()[0] for bar in axis.containers] == [85 - 79]
        assert [text.get_text() for text in axis.get_yticklabels()] == ["cross_entropy sym50"]

    def test_a_published_gain_that_is_not_comparable_is_not_shown(self):
        (axis,) = gain_figure(ROWS).axes
        assert len(axis.containers) == 1
        assert not [line for line in axis.lines if str(line.get_label()).endswith("published")]

    def test_without_a_pair_there_is_nothing_to_show(self):
        with pytest.raises(
            ValueError, match="expected a method with finished seeds both with and without SANM, got none"
        ):
            gain_figure(ROWS[:1])


class TestCommand:
    def test_writes_table_and_figure(self, study, typed):
        record, cells, _ = study()
        finish_all(record, cells)
        status, said = typed("table", "out", "--format", "csv", "--out", "t.csv", "--figure", "gain.png")
        assert (status, said) == (0, "")
        assert len(Path("t.csv").read_text().splitlines()) == 1 + 4
        with Image.open("gain.png") as picture:
            assert picture.width == 7 * 150
        assert (
            typed("table", "out")[1]
            .splitlines()[2]
            .startswith("| cross_entropy | base | cifar10 | sym50 | 2 | 83.00 ± 1.41")
        )

    def test_the_saved_results_have_the_table_of_the_folder(self, study, typed):
        record, cells, _ = study()
        finish_all(record, cells[:5])
        assert typed("table", "out", "--format", "json", "--out", "saved.json") == (0, "")
        assert typed("table", "saved.json")[1] == typed("table", "out")[1]
        assert typed("table", "saved.json", "--format", "json")[1] == Path("saved.json").read_text()

    def test_a_file_without_saved_results(self, typed):
        Path("other.json").write_text("[]")
        with pytest.raises(
            ValueError, match=r"expected the results of a study in 'other.json', got other content; write"
        ):
            typed("table", "other.json")

    @pytest.mark.parametrize("content", ["{}", "[]", '{"saved": 3}', '{"saved": [{}]}'])
    def test_a_file_or_folder_with_other_json(self, typed, content):
        Path("file.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"expected the results of a study in 'file.json', got other content; write"
        ):
            typed("table", "file.json")
        Path("folder").mkdir()
        Path("folder/cells.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"expected the cells of a study in 'folder/cells.json', got other content"
        ):
            typed("table", "folder")

    def test_a_state_with_other_json(self, study, typed):
        record, cells, _ = study()
        finish_all(record, cells)
        (record.folder(cells[0]) / "state.json").write_text('{"condition": "good"}')
        with pytest.raises(ValueError, match=r"expected the state of a cell in .*, got other content; remove the file"):
            typed("table", str(record.root))

    def test_a_folder_that_is_not_that_of_a_study(self, typed):
        with pytest.raises(
            FileNotFoundError, match=r"expected the folder of a study, got 'out' without cells.json; run 'sanm study"
        ):
            typed("table", "out")

    def test_a_study_without_results(self, study, typed):
        study()
        with pytest.raises(
            ValueError, match="expected results of one or more cells, got none in 'out'; run 'sanm study' first"
        ):
            typed("table", "out")

    def test_a_figure_of_another_type(self, typed):
        with pytest.raises(
            ValueError, match=r"expected a file with extension .png for --figure, got 'gain.pdf'; rename it"
        ):
            typed("table", "out", "--figure", "gain.pdf")


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO name=.*_log.(out|err):pytest.PytestUnraisableExceptionWarning"
)
def test_a_study_of_one_real_cell_from_its_file_to_its_table(write, typed, monkeypatch):
    """The only cell of these tests that runs ``sanm fit``."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    options = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "model.network": "small_cnn", "audit": False,
               "model.network_args": {"width": 4}, "data.image_size": 8}  # fmt: skip
    path = write(methods=["cross_entropy"], data=["digits"], sanm=["base"], seeds=[1], options=options)
    status, said = typed("study", path, "--out", "out", "--executor", "debug")
    assert status == 0, said
    folder = Path("out/cross_entropy/base/digits/sym50/seed1")
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["seed"], results["epochs"]) == ("CrossEntropy", 1, 1)
    assert {"checkpoints", "config.yaml", "labels.npz", "log.txt", "metrics.csv"} <= {
        part.name for part in folder.iterdir()
    }
    row = typed("table", "out")[1].splitlines()[2]
    assert row.startswith(f"| cross_entropy | base | digits | sym50 | 1 | {100 * results['test_accuracy_best']:.2f} |")


def test_the_table_in_the_documentation_is_that_of_its_results(typed):
    said = typed("table", str(ROOT / "results" / "studies" / "smoke.json"))[1]
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 12
    assert "\n".join(lines) in (ROOT / "docs" / "studies.md").read_text()
