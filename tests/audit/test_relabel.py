"""Corrections of labels: what is written, what is refused, what an undo removes."""

import csv
import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from sanm_lightning.audit.label_issues import LabelIssues, write_label_issues
from sanm_lightning.audit.relabel import relabel, undo_relabel
from sanm_lightning.audit.run_folder import write_audit
from sanm_lightning.audit.sets import audit_set_of
from sanm_lightning.audit.summary import summarize
from sanm_lightning.audit.verdicts import read_accepted
from sanm_lightning.cli import entry_point
from sanm_lightning.data import ImageFolder, Noise, Toy
from tests.data.test_image_folder import SIDE, folder

CLASSES = ["=1", "cat", "dog"]
HEADER = "path,split,given_label,verdict,new_label\n"


@pytest.fixture
def audit(tmp_path):
    """An audit of nine files in three classes, three splits apart; sample i has quality i / 10."""
    paths = [f"{split}/{name}/{i}.png" for i, split in enumerate(["train", "val", "test"]) for name in CLASSES]
    for path in paths:
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_bytes(path.encode())
    n = len(paths)
    given = np.arange(n) % 3
    issues = LabelIssues(
        paths, [path.split("/")[0] for path in paths], given, (given + 1) % 3, np.arange(n) / 10, np.full(n, 0.1),
        np.arange(n) / 10, CLASSES, unreadable={8: "truncated"},
    )  # fmt: skip
    folder = tmp_path / "audit"
    folder.mkdir()
    write_label_issues(folder / "label_issues.csv", issues)
    (folder / "audit.json").write_text(json.dumps({"root": str(tmp_path / "root")}))
    return folder


def accept(audit, *rows: str, header: str = HEADER):
    path = audit.parent / "accepted.csv"
    path.write_text(header + "".join(row + "\n" for row in rows))
    return path


def table(path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: row[1:] for row in rows}


def snapshot(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestAccepted:
    def test_verdicts_are_applied(self, audit, tmp_path):
        path = accept(
            audit,
            "train/cat/0.png,train,cat,wrong,dog",
            "train/dog/0.png,train,dog,drop,",
            "val/cat/1.png,val,cat,ambiguous,",
            "val/dog/1.png,val,dog,right,",
        )
        before = snapshot(tmp_path / "root")
        result = relabel(audit, path, out=tmp_path / "new" / "labels.csv")
        labels = table(tmp_path / "new" / "labels.csv")
        assert len(labels) == 9
        assert labels["train/cat/0.png"] == ["dog", "0"]
        assert labels["train/dog/0.png"] == ["dog", "1"]
        assert labels["val/cat/1.png"] == ["cat", "0"]
        assert labels["train/=1/0.png"] == ["'=1", "0"]  # as in label_issues.csv
        assert result[1:] == (9, 1, 1)
        assert table(tmp_path / "new" / "changes.csv") == {
            "train/cat/0.png": ["cat", "dog", "0"],
            "train/dog/0.png": ["dog", "dog", "1"],
        }
        assert snapshot(tmp_path / "root") == before

    def test_ambiguous_samples_can_be_dropped(self, audit, tmp_path):
        path = accept(audit, "val/cat/1.png,val,cat,ambiguous,")
        relabel(audit, path, out=tmp_path / "labels.csv", ambiguous="drop")
        assert table(tmp_path / "labels.csv")["val/cat/1.png"] == ["cat", "1"]

    def test_new_classes_when_asked_for(self, audit, tmp_path):
        path = accept(audit, 'val/cat/1.png,val,cat,wrong,"a ""fox"", red"')
        with pytest.raises(ValueError, match="1 others of 1"):
            relabel(audit, path, out=tmp_path / "labels.csv")
        relabel(audit, path, out=tmp_path / "labels.csv", new_classes=True)
        assert table(tmp_path / "labels.csv")["val/cat/1.png"][0] == 'a "fox", red'

    def test_classes_without_samples_are_known(self, audit, tmp_path):
        np.savez(audit / "samples.npz", class_names=np.array([*CLASSES, "fox"]))
        relabel(audit, accept(audit, "val/cat/1.png,val,cat,wrong,fox"), out=tmp_path / "labels.csv")

    def test_escaped_cells_are_read(self, audit):
        read = read_accepted(accept(audit, "train/=1/0.png,train,'=1,wrong,'=1"))
        assert (read.given, read.new_labels) == (["=1"], ["=1"])

    def test_positions_in_place_of_paths(self, tmp_path):
        n = 12
        issues = LabelIssues(
            None, ["train"] * n, np.zeros(n, int), np.ones(n, int), np.zeros(n), np.zeros(n), np.ones(n), ["a", "b"],
            index=np.arange(n)[::-1],
        )  # fmt: skip
        write_label_issues(tmp_path / "label_issues.csv", issues)
        (tmp_path / "accepted.csv").write_text(HEADER.replace("path", "index") + "10,train,a,wrong,b\n")
        relabel(tmp_path, tmp_path / "accepted.csv", out=tmp_path / "labels.csv")
        labels = table(tmp_path / "labels.csv")
        assert list(labels) == [str(i) for i in range(n)]
        assert [name for name, row in labels.items() if row[0] == "b"] == ["10"]
        with pytest.raises(ValueError, match="without files"):
            relabel(tmp_path, tmp_path / "accepted.csv", linked=tmp_path / "linked")

    @pytest.mark.parametrize(
        ("rows", "says"),
        [
            (["other/1.png,train,cat,right,"], "1 of 1 in .* not among its 9, the first 'other/1.png'"),
            (["train/cat/0.png,train,dog,right,"], "1 others of 1 in .* the first 'dog'"),
            (["train/cat/0.png,train,cat,maybe,"], "a verdict among"),
            (["train/cat/0.png,train,cat,wrong,"], "expected a new label"),
            (["train/cat/0.png,train,cat,right,dog"], "expected a new label"),
            (["train/cat/0.png,train,cat,wrong,fox"], "new_classes"),
            (["train/cat/0.png,train,cat,drop,", "train/cat/0.png,train,cat,right,"], "each sample once"),
            (["train/cat/0.png,train,cat"], "5 cells"),
            ([], "got none"),
        ],
    )
    def test_files_of_another_data_set_or_damaged_write_nothing(self, audit, tmp_path, rows, says):
        with pytest.raises(ValueError, match=says):
            relabel(audit, accept(audit, *rows), out=tmp_path / "new" / "labels.csv")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
    def test_another_separator(self, audit, tmp_path, separator, name):
        row = "train/cat/0.png,train,cat,right,".replace(",", separator)
        with pytest.raises(ValueError, match=f"file separated by commas in .*, got {name}; save it as 'CSV UTF-8 "):
            relabel(audit, accept(audit, row, header=HEADER.replace(",", separator)), out=tmp_path / "labels.csv")

    def test_an_empty_file(self, audit, tmp_path):
        with pytest.raises(ValueError, match="empty file"):
            relabel(audit, accept(audit, header=""), out=tmp_path / "labels.csv")


class TestSuggestions:
    def test_those_at_or_below_a_quality(self, audit, tmp_path):
        assert relabel(audit, below=0.3, out=tmp_path / "labels.csv").num_changed == 4
        assert table(tmp_path / "labels.csv")["train/dog/0.png"][0] == "'=1"

    def test_and_of_a_probability(self, audit, tmp_path):
        assert relabel(audit, below=0.3, min_p_suggested=0.2, out=tmp_path / "labels.csv").num_changed == 2

    def test_unreadable_samples_stay(self, audit, tmp_path):
        assert relabel(audit, below=1.0, out=tmp_path / "labels.csv").num_changed == 8


class TestLinked:
    def test_files_lie_under_their_new_label(self, audit, tmp_path):
        path = accept(audit, "train/cat/0.png,train,cat,wrong,dog", "val/dog/1.png,val,dog,drop,")
        relabel(audit, path, linked=tmp_path / "linked")
        found = {str(p.relative_to(tmp_path / "linked")): p.read_text() for p in (tmp_path / "linked").glob("*/*/*")}
        assert found == {
            "train/=1/0.png": "train/=1/0.png",
            "train/dog/0.png": "train/dog/0.png",  # who stays keeps the name
            "train/dog/0-2.png": "train/cat/0.png",
            "val/=1/1.png": "val/=1/1.png",
            "val/cat/1.png": "val/cat/1.png",
            "test/=1/2.png": "test/=1/2.png",
            "test/cat/2.png": "test/cat/2.png",
            "test/dog/2.png": "test/dog/2.png",
        }
        assert all(p.is_symlink() for p in (tmp_path / "linked").glob("*/*/*"))

    @pytest.mark.parametrize("hard", [True, False])
    def test_copies_where_links_fail(self, audit, tmp_path, monkeypatch, hard):
        def fails(*args, **kwargs):
            raise OSError("no links")

        monkeypatch.setattr(os, "symlink", fails)
        if not hard:
            monkeypatch.setattr(os, "link", fails)
        before = snapshot(tmp_path / "root")
        relabel(audit, below=0.0, linked=tmp_path / "linked")
        assert (tmp_path / "linked/train/cat/0-2.png").read_text() == "train/=1/0.png"
        assert (tmp_path / "linked/val/cat/1.png").samefile(tmp_path / "root/val/cat/1.png") == hard
        undo_relabel(tmp_path / "linked")
        assert not (tmp_path / "linked").exists()
        assert snapshot(tmp_path / "root") == before

    def test_is_whole_or_not_there(self, audit, tmp_path, monkeypatch):
        def fails(*args):
            raise OSError("full")

        monkeypatch.setattr("sanm_lightning.audit.relabel.write_csv", fails)
        with pytest.raises(OSError, match="full"):
            relabel(audit, below=0.0, linked=tmp_path / "linked")
        assert not list(tmp_path.glob("linked*"))

    def test_refuses_what_exists_and_what_cannot_be(self, audit, tmp_path):
        (tmp_path / "linked").mkdir()
        with pytest.raises(FileExistsError, match="exists already"):
            relabel(audit, below=0.0, linked=tmp_path / "linked", overwrite=True)
        with pytest.raises(FileNotFoundError, match="9 that are not there"):
            relabel(audit, below=0.0, linked=tmp_path / "other", root=tmp_path)
        (audit / "audit.json").unlink()
        with pytest.raises(ValueError, match="give --root"):
            relabel(audit, below=0.0, linked=tmp_path / "other")
        path = accept(audit, "train/cat/0.png,train,cat,wrong,../x")
        with pytest.raises(ValueError, match="names of folders"):
            relabel(audit, path, linked=tmp_path / "other", root=tmp_path / "root", new_classes=True)
        assert not list(tmp_path.glob("other*"))


class TestSamplesThatWereNotAudited:
    """A label file contains the whole original set: also what is held out, outside of the subset, or dropped before."""

    def audited(self, data, tmp_path):
        """An audit of the training split in which the first sample is wrong."""
        pool, probs = audit_set_of(data), np.full((data.num_samples, data.num_classes), 1 / data.num_classes)
        quality = np.linspace(0, 1, data.num_samples)
        issues = LabelIssues(
            pool.paths, pool.splits, pool.labels, (pool.labels + 1) % data.num_classes, quality, quality, 1 - quality,
            pool.class_names, index=pool.index,
        )  # fmt: skip
        joint = np.eye(data.num_classes) / data.num_classes
        write_audit(tmp_path / "run", pool, issues, probs, summarize(pool, issues, joint))
        return tmp_path / "run"

    def test_of_a_folder_with_a_held_out_split_and_an_earlier_label_file(self, tmp_path):
        root = folder(tmp_path / "data", {"a": 6, "b": 6})
        first = "".join(f"train/{name}/{i}.png,b,{int(i == 2)}\n" for name in "ab" for i in range(6))
        (tmp_path / "first.csv").write_text("path,label,drop\n" + first.replace("train/a/4.png,b", "train/a/4.png,a"))

        def data(file):
            noise = Noise("file", path=str(tmp_path / file))
            return ImageFolder(str(root), image_size=SIDE, seed=1, noise=noise, holdout_fraction=0.3)

        before = data("first.csv")
        run = self.audited(before, tmp_path)
        assert relabel(run, below=0, out=tmp_path / "second/labels.csv")[1:] == (12, 1, 2)
        changed = before.table("train").origin[0]
        (_, (old, kept)), (_, (new, kept_again)) = before.original_set(), data("second/labels.csv").original_set()
        assert kept.tolist() == kept_again.tolist() == [i % 6 != 2 for i in range(12)]
        assert (old != new).nonzero().tolist() == [[changed]]
        assert old.tolist() == [1, 1, 1, 1, 0, 1, *[1] * 6]

        assert relabel(run, below=0, linked=tmp_path / "linked")[1:] == (12, 1, 2)
        assert len(list((tmp_path / "linked/train").rglob("*.png"))) == 10

    def test_of_a_subset_without_files(self, tmp_path):
        before = Toy(seed=0, noise=Noise("symmetric", 0.5), max_train_samples=16, val_fraction=0.25)
        run = self.audited(before, tmp_path)
        relabel(run, below=0, out=tmp_path / "labels.csv")
        again = Toy(seed=0, noise=Noise("file", path=str(tmp_path / "labels.csv")))
        used = torch.cat([before.table(name).origin for name in ("train", "val")]).sort().values
        assert again.table("train").origin.tolist() == used.tolist()  # others have no noise
        old = before.original_set()[1].labels[used]
        assert used[old != again.labels].tolist() == [before.table("train").origin[0]]
        assert old.tolist() != before._source("train").labels[used].tolist()
        plain = Toy(seed=0, max_train_samples=16)
        assert plain.original_set()[1].kept.all()


class TestUndo:
    @pytest.mark.parametrize("kind", ["out", "linked"])
    def test_removes_what_was_written_and_nothing_else(self, audit, tmp_path, kind):
        target = tmp_path / ("new/labels.csv" if kind == "out" else "new")
        if kind == "out":
            (tmp_path / "new").mkdir()
        before = snapshot(tmp_path)
        relabel(audit, below=0.3, **{kind: target})
        undo_relabel(target)
        assert snapshot(tmp_path) == before
        assert (tmp_path / "new").exists() == (kind == "out")

    def test_what_somebody_else_put_there_stays(self, audit, tmp_path):
        relabel(audit, below=0.3, linked=tmp_path / "linked")
        (tmp_path / "linked/train/dog/mine.txt").write_text("mine")
        undo_relabel(tmp_path / "linked")
        assert [p.name for p in (tmp_path / "linked").rglob("*") if p.is_file()] == ["mine.txt"]

    def test_refuses_what_was_modified(self, audit, tmp_path):
        relabel(audit, below=0.3, out=tmp_path / "labels.csv")
        with (tmp_path / "labels.csv").open("a") as file:
            file.write("mine,cat,0\n")
        with pytest.raises(ValueError, match=r"1 modified since, the first 'labels\.csv'"):
            undo_relabel(tmp_path / "labels.csv")
        assert (tmp_path / "changes.csv").exists()

    def test_refuses_other_links(self, audit, tmp_path):
        relabel(audit, below=0.3, linked=tmp_path / "linked")
        link = tmp_path / "linked/val/cat/1.png"
        link.unlink()
        link.symlink_to(tmp_path / "root/train/cat/0.png")
        with pytest.raises(ValueError, match="1 modified"):
            undo_relabel(tmp_path / "linked")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {"../a": "x"}, "links": {}, "folders": []}'])
    def test_damaged_records(self, tmp_path, content):
        (tmp_path / "relabel.json").write_text(content)
        with pytest.raises(ValueError, match="remove it by hand"):
            undo_relabel(tmp_path / "labels.csv")

    def test_without_a_record(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"relabel\.json.*; give the label file or folder that"):
            undo_relabel(tmp_path / "labels.csv")


class TestOverwriting:
    def test_is_refused(self, audit, tmp_path):
        relabel(audit, below=0.3, out=tmp_path / "labels.csv")
        before = snapshot(tmp_path)
        with pytest.raises(FileExistsError, match="is not replaced"):
            relabel(audit, below=0.5, out=tmp_path / "labels.csv")
        assert snapshot(tmp_path) == before

    def test_leaves_nothing_half_written(self, audit, tmp_path, monkeypatch):
        def fails(*args):
            raise OSError("full")

        before = snapshot(tmp_path)
        monkeypatch.setattr("sanm_lightning.audit.relabel._write_record", fails)
        with pytest.raises(OSError, match="full"):
            relabel(audit, below=0.3, out=tmp_path / "labels.csv")
        assert snapshot(tmp_path) == before

    def test_of_label_files_when_asked_for(self, audit, tmp_path):
        relabel(audit, below=0.3, out=tmp_path / "labels.csv")
        relabel(audit, below=0.5, out=tmp_path / "labels.csv", overwrite=True)
        assert len(table(tmp_path / "changes.csv")) == 6
        undo_relabel(tmp_path / "labels.csv")

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [("audit/label_issues.csv", "is not replaced"), ("root/train/cat/0.png", "expected a folder outside of")],
    )
    def test_of_anything_else_never(self, audit, tmp_path, name, sentence):
        before = snapshot(tmp_path)
        with pytest.raises((FileExistsError, ValueError), match=sentence):
            relabel(audit, below=0.3, out=tmp_path / name, overwrite=True)
        assert snapshot(tmp_path) == before


class TestCommand:
    def typed(self, monkeypatch, *words):
        monkeypatch.setattr(sys, "argv", ["sanm", "relabel", *map(str, words)])
        entry_point()

    def test_writes_and_undoes(self, audit, tmp_path, monkeypatch, capsys):
        out = tmp_path / "labels.csv"
        self.typed(monkeypatch, audit, "--below", "0.3", "--out", out)
        assert "9 samples, 4 with a new label, 0 dropped" in capsys.readouterr().out
        self.typed(monkeypatch, "--undo", out)
        assert "2 files removed" in capsys.readouterr().out
        assert not out.exists()

    def test_help_names_the_options(self, monkeypatch, capsys):
        with pytest.raises(SystemExit) as ended:
            self.typed(monkeypatch, "--help")
        assert ended.value.code == 0
        assert "--accepted" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ([], "either AUDIT_FOLDER or --undo"),
            (["nowhere", "--below", "0.1", "--out", "x.csv"], "run sanm audit first"),
            (["nowhere", "--out", "x.csv"], "either --accepted FILE or --below"),
            (["nowhere", "--below", "0.1"], "either --out FILE or --linked"),
            (["nowhere", "--below", "1.1", "--out", "x.csv"], r"below in \[0, 1\], got 1.1; use 0.1"),
            (["nowhere", "--below", "0.1", "--out", "x.csv", "--ambiguous", "no"], "keep or drop"),
        ],
    )
    def test_mistakes_end_in_a_sentence(self, monkeypatch, capsys, words, says):
        with pytest.raises(SystemExit) as ended:
            self.typed(monkeypatch, *words)
        assert ended.value.code == 2
        assert re.search(says, capsys.readouterr().err)
