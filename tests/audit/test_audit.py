"""The audit of folders and data modules: planted faults, the cache, what is refused, and the command's exit status."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import sanm_lightning.audit.run
import sanm_lightning.audit.run_folder
from sanm_lightning.audit import (
    AuditSet,
    audit_set,
    folder_audit_set,
    read_label_issues,
    read_noise_rate,
)
from sanm_lightning.audit.duplicates import find_duplicates
from sanm_lightning.audit.features import FeatureTable, FrozenFeatures, compute_features, default_image_size
from sanm_lightning.audit.run import audit_features
from sanm_lightning.cli import _read_noise_rate, entry_point, main
from sanm_lightning.commands import run
from sanm_lightning.data.label_rows import read_label_file
from sanm_lightning.functional.noise_model import judge_labels
from sanm_lightning.models import Normalized, load_pretrained
from sanm_lightning.models.pretrained import packaged_weights

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def picture(color: str, seed: int, side: int = 24) -> Image.Image:
    """A picture of one color with a pattern of its own: no two are near copies."""
    draw = np.random.default_rng([seed, *color.encode()])
    pattern = draw.normal(0, 35, (6, 6, 1)).repeat(side // 6, 0).repeat(side // 6, 1)
    pixels = np.array(COLORS[color]) + pattern + draw.normal(0, 6, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(path: Path, color: str, seed: int, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(color, seed).save(path, **options)
    return path


def folder(root: Path, per_class: int = 12, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Make class folders of pictures; the first of each class of the training split has the label of the next class."""
    for number, split in enumerate(splits):
        for c, color in enumerate(COLORS):
            for i in range(per_class if split == "train" else 4):
                label = list(COLORS)[(c + 1) % 3] if (split, i) == ("train", 0) else color
                save(root / split / label / f"{color}{i}.png", color, 1000 * number + i)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """Random weights of the package's small network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(timm.create_model("small_cnn").state_dict(), path)
    return str(path)


@pytest.fixture
def audit(tmp_path, weights):
    """``sanm audit`` with the small network: words -> (exit status, folder of results)."""
    count = iter(range(100))

    def audit(*words: object, status: int = 0) -> Path:
        out = tmp_path / f"out{next(count)}"
        options = ["--network", "small_cnn", "--checkpoint", weights, "--image_size", "24", "--num_workers", "0"]
        options += ["--cache", str(tmp_path / "cache"), "--out", str(out)]
        assert run(["audit", *options, *map(str, words)]) == status
        return out

    return audit


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "label_issues.csv").open(newline="") as file:
        return {row[next(iter(row))]: row for row in csv.DictReader(file)}


def summary(out: Path) -> dict:
    return json.loads((out / "audit.json").read_text())


def qualities(out: Path, split: str) -> dict[str, str]:
    return {path: row["quality"] for path, row in table(out).items() if row["split"] == split}


class TestFiles:
    def test_wrong_labels_come_first_and_all_files_are_there(self, tmp_path, audit, capsys):
        out = audit(folder(tmp_path / "root"))
        issues = read_label_issues(out / "label_issues.csv")
        worst = {issues.paths[row] for row in issues.order()[:3]}
        assert worst == {"train/green/blue0.png", "train/red/green0.png", "train/blue/red0.png"}
        for path in worst:
            row = table(out)[path]
            assert row["suggested_label"] == Path(path).stem[:-1]
            assert float(row["quality"]) < 0.5
            assert float(row["p_suggested"]) > float(row["p_given"])
            assert set(row["neighbor_labels"].split("|")) <= set(COLORS)
        assert min(issues.quality[issues.order()[3:]]) > 0.5
        assert len(issues) == 3 * 12 + 3 * 4
        probs, features = np.load(out / "pred_probs.npy"), np.load(out / "features.npy")
        with np.load(out / "samples.npz", allow_pickle=False) as samples:
            paths, labels, names = samples["paths"].tolist(), samples["labels"], samples["class_names"].tolist()
            quality = samples["quality"]
            assert samples["readable"].all()
        assert sorted(paths) == sorted(str(p.relative_to(tmp_path / "root")) for p in tmp_path.glob("root/*/*/*"))
        assert [Path(path).parts[:2] for path in paths] == [
            (table(out)[path]["split"], names[label]) for path, label in zip(paths, labels, strict=True)
        ]
        assert probs.shape == (48, 3)
        np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
        for path, row, own, p in zip(paths, labels, quality, probs, strict=True):
            assert float(table(out)[path]["p_given"]) == pytest.approx(p[row], abs=1e-6)
            assert float(table(out)[path]["quality"]) == pytest.approx(own, abs=1e-6)
        assert features.shape[0] == 48 and features.any(1).all()
        assert {path.name for path in out.iterdir()} == {
            "label_issues.csv", "pred_probs.npy", "features.npy", "samples.npz", "audit.json", "report.html",
        }  # fmt: skip
        found = summary(out)
        assert found["num_images"] == 48
        counts = {name: part["count"] for name, part in found["splits"].items()}
        assert counts == {"train": 36, "test": 12}
        assert found["interval"][0] <= 3 / 36 <= found["interval"][1]
        assert found["noise_rate"] == pytest.approx(3 / 36, abs=0.03)
        said = " ".join(capsys.readouterr().out.split())
        assert f"{found['noise_rate']:.1%} of 36 labels of train are wrong" in said
        assert "Classes of train" in said
        assert found["fitted_split"] == "train"
        assert {row["name"]: row["count"] for row in found["classes"]} == dict.fromkeys(COLORS, 12)
        page = (out / "report.html").read_text()
        assert f'"title":"{tmp_path / "root"}"' in page and '"classes_of":"train"' in page

    def test_a_class_of_the_test_split_only_has_no_share_of_wrong_labels(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        for number in range(4):
            save(root / "test/white" / f"{number}.png", "red", 900 + number)
        white = next(row for row in summary(audit(root))["classes"] if row["name"] == "white")
        assert white == {"name": "white", "count": 0, "wrong": None, "confused_with": None}

    def test_two_runs_are_equal_byte_by_byte_with_and_without_the_cache(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        one, two, fresh = audit(root), audit(root), audit(root, "--cache", tmp_path / "other")
        for name in ("label_issues.csv", "pred_probs.npy", "features.npy"):
            assert (one / name).read_bytes() == (two / name).read_bytes() == (fresh / name).read_bytes(), name

    def test_labels_of_the_test_split_change_no_training_row(self, tmp_path, weights):
        root = folder(tmp_path / "root")
        shutil.copy(root / "train/red/red5.png", root / "test/red/copy.png")  # a group over both splits
        pool = folder_audit_set(root)
        train = np.array(pool.splits) == "train"
        options = {"network": "small_cnn", "checkpoint": weights, "image_size": 24, "cache": "cache"}
        before = audit_set(pool, **options)
        turned = np.where(train, pool.labels, (pool.labels + 1) % 3)
        after = audit_set(dataclasses.replace(pool, labels=turned), **options)
        for name in ("quality", "p_given", "p_suggested", "suggested"):
            one, two = getattr(before.issues, name), getattr(after.issues, name)
            assert np.array_equal(one[train], two[train]), name
            assert not np.array_equal(one[~train], two[~train]) or name in ("suggested", "p_suggested")
        assert np.array_equal(before.probs, after.probs)
        assert before.noise.noise_rate == after.noise.noise_rate
        assert before.issues.quality[~train].min() > 0.5 > np.median(after.issues.quality[~train])

    def test_quality_outside_the_training_split_is_that_of_judge_labels(self, tmp_path, weights):
        pool = folder_audit_set(folder(tmp_path / "root"))
        options = {"network": "small_cnn", "checkpoint": weights, "image_size": 24, "cache": "cache"}
        found = audit_set(pool, **options)
        rows = np.flatnonzero(np.array(pool.splits) == "test")
        given = pool.labels[rows]
        expected = judge_labels(found.probs[rows], given, found.noise.transition)[np.arange(len(rows)), given]
        np.testing.assert_allclose(found.issues.quality[rows], expected, rtol=1e-5)

    def test_copies_are_in_one_fold(self, tmp_path, weights, monkeypatch):
        root = folder(tmp_path / "root", splits=("train",))
        for i in range(6):
            shutil.copy(root / "train/red/red5.png", root / f"train/green/copy{i}.png")
        pool, seen = folder_audit_set(root), []
        assign = sanm_lightning.audit.run.assign_folds

        def watched(*arguments):
            seen.append(assign(*arguments))
            return seen[-1]

        monkeypatch.setattr(sanm_lightning.audit.run, "assign_folds", watched)
        audit_set(pool, network="small_cnn", checkpoint=weights, image_size=24, cache="cache")
        copies = [row for row, path in enumerate(pool.paths) if "copy" in path or path.endswith("red5.png")]
        assert len(copies) == 7 and len(set(seen[0][copies].tolist())) == 1
        assert len(set(seen[0].tolist())) == 5

    def test_features_are_standardized_over_the_training_split(self, tmp_path, weights, monkeypatch):
        root = folder(tmp_path / "root")
        (root / "train/red/red3.png").write_bytes(b"no image")
        pool, seen = folder_audit_set(root), []
        standardize = sanm_lightning.audit.run.standardize

        def watched(features, rows):
            found = standardize(features, rows)
            seen.append(found.copy())  # the audit overwrites them
            return found

        monkeypatch.setattr(sanm_lightning.audit.run, "standardize", watched)
        audit_set(pool, network="small_cnn", checkpoint=weights, image_size=24, cache="cache")
        train = np.array([s for s, path in zip(pool.splits, pool.paths, strict=True) if path != "train/red/red3.png"])
        own = seen[0][train == "train"]
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(own.std(0)[own.any(0)], 1, atol=1e-5)


class TestPlantedFaults:
    def test_all_are_found_or_named_and_none_is_lost(self, tmp_path, audit, capsys):
        root = folder(tmp_path / "root")
        train = root / "train"
        shutil.copy(train / "red/red1.png", train / "red/red1 copy.png")  # an exact copy
        picture("red", 2).resize((30, 30)).save(train / "red/again.jpg", quality=90)  # a near one
        shutil.copy(train / "green/green3.png", train / "blue/contradicting.png")
        shutil.copy(train / "blue/blue4.png", root / "test/blue/leaked.png")
        (root / "test/green").rename(root / "test/Green")  # a renamed class
        (train / "yellow").mkdir()  # an empty one
        (train / "red/corrupt.png").write_bytes((train / "red/red3.png").read_bytes()[:200])
        (train / "red/empty.jpg").write_bytes(b"")
        picture("blue", 50).convert("L").save(train / "blue/grey.png")
        picture("blue", 51).convert("CMYK").save(train / "blue/cmyk.jpg")
        picture("green", 52).quantize(16).save(train / "green/palette.png")
        picture("green", 53).convert("RGBA").save(train / "green/rgba.png")
        deep = np.random.default_rng(0).integers(0, 2**16, (24, 24)).astype(np.uint16)
        Image.fromarray(deep).save(train / "red/deep.png")
        save(train / "red/sub/folder/inner.png", "red", 54)
        hard = ['with "quotes", commas.png', "two\nlines.png", "<b>tag</b>.png", "it's.png"]
        for number, name in enumerate(hard):
            save(train / "red" / name, "red", 60 + number)
        save(train / "=red+1/one.png", "red", 70)
        (train / "red/notes.txt").write_text("no image")
        out = audit(root)

        files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        files.remove("train/red/notes.txt")
        rows = table(out)
        issues = read_label_issues(out / "label_issues.csv")
        assert len(issues) == len(files)
        assert set(issues.paths) == files
        assert "'=red+1" in {row["given_label"] for row in rows.values()}  # no formula in a spreadsheet
        assert "=red+1" in issues.class_names

        last = [issues.paths[row] for row in range(len(issues) - 2, len(issues))]
        assert set(last) == {"train/red/corrupt.png", "train/red/empty.jpg"}
        for path in last:
            assert rows[path]["neighbor_labels"].startswith("unreadable: ")
            assert len(rows[path]["neighbor_labels"]) > len("unreadable: xx")
            assert rows[path]["quality"] == rows[path]["suggested_label"] == ""
        found = summary(out)
        assert set(found["unreadable"]) == set(last)
        for parts in ("exact", "near", "contradicting", "leaks"):
            found["duplicates"][parts] = [set(part) for part in found["duplicates"][parts]]
        assert found["duplicates"] == {
            "exact": [
                {"train/blue/blue4.png", "test/blue/leaked.png"},
                {"train/blue/contradicting.png", "train/green/green3.png"},
                {"train/red/red1 copy.png", "train/red/red1.png"},
            ],
            "near": [{"train/red/again.jpg", "train/red/red2.png"}],
            "contradicting": [{"train/blue/contradicting.png", "train/green/green3.png"}],
            "leaks": [{"train/blue/blue4.png", "test/blue/leaked.png"}],
        }
        notes = "\n".join(found["notes"])
        assert "Classes without images: 'yellow'" in notes
        assert "'Green' (test only)" in notes
        assert "'green' (train only)" in notes
        assert (
            "1 file skipped (1 extension .txt unknown to Pillow)." in notes and "skipped train/red/notes.txt." in notes
        )
        assert "2 unreadable, such as " in notes
        assert "'=red+1' (1)" in notes  # fewer than five
        renamed = [row for path, row in rows.items() if path.startswith("test/Green/")]
        assert len(renamed) == 4
        assert {row["suggested_label"] for row in renamed} == {"green"}
        assert max(float(row["quality"]) for row in renamed) < 0.1
        said = " ".join(capsys.readouterr().out.split())
        assert "3 exact copies, 1 near copies, 1 with different labels, 1 across splits" in said
        page = (out / "report.html").read_text()
        assert "<b>tag" not in page

    def test_names_that_are_not_utf8(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        train = os.fsencode(root / "train")
        shutil.copy(train + b"/blue/blue1.png", train + b"/blue/\xff.png")
        Path(os.fsdecode(train + b"/red/\xfe.png")).write_bytes(b"no image")
        os.rename(train + b"/green", train + b"/gr\xfcn")
        os.rename(os.fsencode(root / "test/green"), os.fsencode(root / "test") + b"/gr\xfcn")
        out = audit(root)
        found = json.loads((out / "audit.json").read_text(encoding="utf-8"))
        assert found["duplicates"]["exact"] == [["train/blue/blue1.png", "train/blue/\udcff.png"]]
        assert list(found["unreadable"]) == ["train/red/\udcfe.png"]
        assert (
            read_label_issues(out / "label_issues.csv").class_names
            == found["class_names"]
            == ["blue", "gr\udcfcn", "red"]
        )
        assert run(["relabel", str(out), "--below", "0.5", "--out", "new/labels.csv"]) == 0
        issues = read_label_issues(out / "label_issues.csv")
        labels, kept = read_label_file(
            "new/labels.csv", torch.from_numpy(issues.given), issues.class_names, issues.paths
        )
        assert kept.all()
        assert int((labels != torch.from_numpy(issues.given)).sum()) >= 3

    def test_names_that_are_not_utf8_are_printed_escaped(self, tmp_path, weights, monkeypatch):
        root = folder(tmp_path / "root", 4)
        (root / "train/red/\udcfd.txt").write_text("no image")
        (root / "train/red/\udcfe.png").write_bytes(b"no image")
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict"))
        words = ["--network", "small_cnn", "--checkpoint", weights, "--cache", "cache", "--num_workers", "0"]
        monkeypatch.setattr(sys, "argv", ["sanm", "audit", str(root), *words])
        entry_point()
        said = sys.stdout.buffer.getvalue().decode()
        assert "\\udcfd.txt" in said
        assert "\\udcfe.png" in said
        assert "results: " in said

    def test_a_missing_file_whose_name_is_not_utf8_is_unreadable(self, tmp_path, weights):
        network = FrozenFeatures(load_pretrained("small_cnn", weights), 24)
        path = save(tmp_path / "there.png", "red", 0)
        into = np.zeros((2, network.num_features), np.float32)
        found = compute_features([path, tmp_path / "\udcff.png"], network, tmp_path / "cache", into)
        assert list(found.unreadable) == [1]

    def test_a_split_that_cannot_be_read_is_unknown(self, tmp_path, audit, capsys):
        root = folder(tmp_path / "root")
        for path in (root / "test").rglob("*.png"):
            path.write_bytes(b"")
        out = audit(root)
        assert summary(out)["splits"]["test"] == {"count": 12, "noise_rate": None}
        assert "; of test unknown; most frequent: " in capsys.readouterr().out

    def test_duplicates_against_a_loop_over_pairs(self):
        draw = np.random.default_rng(0)
        size = 40
        base = draw.integers(0, 256, (8, 16, 16, 3))
        of = draw.integers(0, 8, size)
        shift = draw.integers(0, 3, size)  # 0 and 1: the same content
        thumbs = (base[of] * 0.8 + 10 * (shift == 2)[:, None, None, None]).astype(np.uint8)
        digests = np.array([np.frombuffer(hashlib.md5(t.tobytes()).digest(), np.uint8) for t in thumbs])
        features = (np.eye(8)[of] + 0.01 * draw.normal(size=(size, 8))).astype(np.float32)
        distance = np.square(features[:, None] - features).sum(2) + 100 * np.eye(size)
        labels, splits = draw.integers(0, 2, size), [("train", "test")[i] for i in draw.integers(0, 2, size)]
        found = find_duplicates(digests, thumbs, features, distance.argsort(1)[:, :6], labels, splits)
        expected = [[i for i in range(size) if of[i] == c] for c in range(8)]
        expected = [part for part in expected if len(part) > 1]
        mixed = [part for part in expected if len({int(shift[i] == 2) for i in part}) > 1]
        assert sorted(found.near) == sorted(mixed)
        same = [[i for i in part if (shift[i] == 2) == two] for part in expected for two in (False, True)]
        assert sorted(found.exact) == sorted(part for part in same if len(part) > 1)
        assert sorted(found.contradicting) == sorted(p for p in expected if len(set(labels[p])) > 1)
        assert sorted(found.leaks) == sorted(p for p in expected if len({splits[i] for i in p}) > 1)
        assert all((found.group[i] == found.group[j]) == (of[i] == of[j]) for i in range(size) for j in range(size))

    def test_copies_do_not_vote_for_each_other(self):
        """Six copies of each image have its label, right or wrong; the estimate of the rate is that without copies."""
        draw = np.random.default_rng(0)
        size, copies, classes = 240, 6, 6
        true = np.arange(size) % classes
        given = np.where(draw.random(size) < 0.2, (true + draw.integers(1, classes, size)) % classes, true)
        features = np.eye(classes, 16)[true] + 0.15 * draw.normal(size=(size, 16))
        thumbs = draw.integers(0, 256, (size, 8, 8, 3)).astype(np.uint8)
        digests = draw.integers(0, 256, (size, 16)).astype(np.uint8)
        found = []
        for times in (1, copies):
            labels, table = np.repeat(given, times), [np.repeat(part, times, 0) for part in (features, digests, thumbs)]
            pool = AuditSet(table, labels, list("abcdef"), ["all"] * len(labels), index=np.arange(len(labels)))
            table[0] = table[0].astype(np.float32)
            found.append(audit_features(pool, FeatureTable(*table, {})))
        once, often = (result.summary for result in found)
        assert abs(often["noise_rate"] - once["noise_rate"]) < 0.03
        assert often["interval"][0] < (given != true).mean() < often["interval"][1]

    def test_a_class_of_unreadable_files_has_no_rate(self, tmp_path, audit, capsys):
        root = folder(tmp_path / "root", splits=("train",))
        (root / "train/broken").mkdir()
        for i in range(6):
            (root / f"train/broken/{i}.png").write_bytes(b"no image")
        found = summary(audit(root))
        (row,) = (row for row in found["classes"] if row["name"] == "broken")
        assert row["wrong"] is None
        assert row["count"] == 6
        assert any("fewer than 5 readable images" in note and "'broken' (0)" in note for note in found["notes"])
        assert "100.0%" not in capsys.readouterr().out

    def test_pictures_that_differ_are_no_copies(self, tmp_path, audit):
        found = summary(audit(folder(tmp_path / "root")))
        assert found["duplicates"] == {"exact": [], "near": [], "contradicting": [], "leaks": []}
        assert found["notes"] == []


@pytest.fixture
def forwards(monkeypatch):
    """Number of images in each forward of the frozen network, the trial one excepted."""
    seen: list[int] = []
    call = FrozenFeatures.__call__

    def counted(self, images):
        if hasattr(self, "num_features"):
            seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(FrozenFeatures, "__call__", counted)
    return seen


class TestCache:
    def test_a_second_audit_computes_nothing_and_changed_content_alone_is_computed_again(
        self, tmp_path, audit, forwards
    ):
        root = folder(tmp_path / "root")
        first = audit(root)
        assert sum(forwards) == 48
        forwards.clear()
        (root / "train/red/red1.png").rename(root / "train/red/renamed.png")  # the content is what counts
        audit(root)
        assert forwards == []
        picture("red", 500).save(root / "train/red/red2.png")
        again = audit(root)
        assert forwards == [1]
        assert table(again)["train/red/red2.png"] != table(first)["train/red/red2.png"]
        forwards.clear()
        audit(root, "--image_size", "32")
        assert sum(forwards) == 48

    @pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty", "of another network"])
    def test_a_damaged_part_is_passed_over_and_replaced(self, tmp_path, audit, forwards, damage, capsys):
        root = folder(tmp_path / "root")
        first = audit(root)
        (part,) = (tmp_path / "cache").glob("*/part-*.npz")
        content = bytearray(part.read_bytes())
        if damage == "cut":
            content = content[:-100]
        elif damage == "flipped":
            content[len(content) // 2] ^= 255
        elif damage == "empty":
            content = bytearray()
        else:
            held = io.BytesIO()
            other = {"x": np.zeros(3)}
            if damage == "of another network":
                with np.load(part) as had:
                    other = {**had, "features": had["features"][:, :5]}
            np.savez(held, **other)
            content = bytearray(held.getvalue())
        part.write_bytes(content)
        forwards.clear()
        again = audit(root)
        assert sum(forwards) == 48
        assert f"cache: {part} is damaged and ignored" in capsys.readouterr().out.replace("\n", "")
        assert (first / "label_issues.csv").read_bytes() == (again / "label_issues.csv").read_bytes()
        forwards.clear()
        audit(root)
        assert forwards == []
        assert "passed over" not in capsys.readouterr().out

    def test_interrupted_work_goes_on_under_the_same_name(self, tmp_path, audit, forwards, monkeypatch, capsys):
        root = folder(tmp_path / "root")
        call = FrozenFeatures.__call__

        def stops(self, images):
            if len(forwards) == 3:
                raise KeyboardInterrupt
            return call(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(FrozenFeatures, "__call__", stops)
            audit(root, "--batch_size", "10", "--out", "here", status=130)
        assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted; computed features are in the cache")
        assert not Path("here").exists()
        Path("here").mkdir()
        Path("here/features.npy.tmp").write_bytes(b"")  # as an audit leaves behind that was killed
        done = sum(forwards)
        assert done == 30
        audit(root, "--batch_size", "10", "--out", "here")
        assert sum(forwards) == 48
        assert len(table(Path("here"))) == 48

    @pytest.mark.parametrize(
        ("error", "status"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
    )
    def test_a_failure_while_results_are_written_leaves_no_folder(self, tmp_path, audit, monkeypatch, error, status):
        root = folder(tmp_path / "root", 6)

        def fails(*args, **options):
            assert {path.name for path in Path("here").iterdir()} >= {"label_issues.csv", "audit.json"}
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(sanm_lightning.audit.run_folder, "write_report", fails)
            if status == 2:
                with pytest.raises(OSError, match="No space left on device"):
                    audit(root, "--out", "here")
            else:
                audit(root, "--out", "here", status=status)
        assert not Path("here").exists()

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is reserved on Linux only")
    def test_a_disk_too_small_for_the_features_is_reported_before_they_are_computed(
        self, tmp_path, audit, forwards, monkeypatch
    ):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            OSError, match=r"expected 0\.0 MB of disk space for the features in .*, got .*\(No space left"
        ):
            audit(folder(tmp_path / "root", 6), "--out", "here")
        assert forwards == []
        assert not Path("here").exists()

    def test_a_folder_of_a_killed_audit_is_written_again(self, tmp_path, audit):
        root = folder(tmp_path / "root", 6)
        Path("here").mkdir()
        for name in ("features.npy.tmp", "label_issues.csv", "audit.json"):
            Path("here", name).write_bytes(b"")
        audit(root, "--out", "here")
        assert len(table(Path("here"))) == 30
        assert not Path("here/features.npy.tmp").exists()

    def test_a_cache_of_other_files_and_a_file_in_its_place_are_refused_before_any_work(
        self, tmp_path, audit, forwards
    ):
        root = folder(tmp_path / "root")
        audit(root)
        (own,) = (tmp_path / "cache").iterdir()
        (own / "letter.txt").write_text("mine")
        forwards.clear()
        with pytest.raises(
            ValueError, match=r"expected a folder of cached features .* such as 'letter.txt'; use another"
        ):
            audit(root)
        assert (own / "letter.txt").read_text() == "mine"
        Path("file").write_text("mine")
        with pytest.raises(OSError, match=r"expected a folder .*file"):
            audit(root, "--cache", "file")
        assert Path("file").read_text() == "mine"
        assert forwards == []


class TestFeatures:
    def test_images_in_memory_and_files_give_what_the_network_says(self, tmp_path, weights):
        network = FrozenFeatures(load_pretrained("small_cnn", weights), 24)
        paths = [save(tmp_path / f"{i}.png", "red", i) for i in range(5)]
        pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths]
        with torch.no_grad():
            maps = network.network.forward_features(torch.stack(pixels) / 255)
        tables = [
            compute_features(
                images, network, tmp_path / f"cache{i}", np.zeros((5, network.num_features), np.float32), 2
            )
            for i, images in enumerate((paths, pixels))
        ]
        for found in tables:
            np.testing.assert_allclose(found.features, maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
            assert found.thumbs.shape == (5, 16, 16, 3)
            assert not found.unreadable
        assert len({row.tobytes() for row in np.concatenate([t.digests for t in tables])}) == 10

    def test_workers_find_the_same(self, tmp_path, weights):
        network = FrozenFeatures(load_pretrained("small_cnn", weights), 24)
        paths = [save(tmp_path / f"{i}.png", "red", i) for i in range(7)]
        paths[3].write_bytes(b"no image")
        tables = [
            compute_features(
                paths, network, tmp_path / f"cache{n}", np.zeros((7, network.num_features), np.float32), 2, n
            )
            for n in (0, 2)
        ]
        assert list(tables[0].unreadable) == list(tables[1].unreadable) == [3]
        for one, two in zip(tables[0][:3], tables[1][:3], strict=True):
            assert np.array_equal(one, two)
        assert not tables[0].features[3].any()

    @pytest.mark.parametrize(
        ("sides", "size"), [([8], 32), ([32] * 3, 96), ([500], 224), ([20, 32, 900], 96), ([], 224)]
    )
    def test_small_images_are_enlarged_up_to_three_times(self, sides, size, weights):
        assert default_image_size(load_pretrained("small_cnn", weights), sides) == size

    def test_a_network_of_one_size_gets_it(self):
        torch.manual_seed(0)
        torch.save(timm.create_model("test_vit").state_dict(), "vit.pt")
        network = load_pretrained("test_vit", "vit.pt")
        assert default_image_size(network, [8]) == 160
        assert FrozenFeatures(network, 160).num_features == 64
        with pytest.raises(
            ValueError, match=r"expected pooled features .* on images of 100 pixels, got AssertionError"
        ):
            FrozenFeatures(network, 100)

    def test_a_network_without_pooled_features_is_refused(self):
        class Maps(nn.Module):
            num_features = 3

            def forward_features(self, x):
                return x

            def forward_head(self, x, pre_logits=False):
                return x

        with pytest.raises(ValueError, match=r"pooled features \(B, D\) .* of Maps .* shape \(1, 3, 8, 8\); use"):
            FrozenFeatures(Normalized(Maps(), (0.5,) * 3, (0.5,) * 3), 8)
        Maps.forward_head = property(lambda self: self.nothing)
        with pytest.raises(ValueError, match=r"got AttributeError"):
            FrozenFeatures(Normalized(Maps(), (0.5,) * 3, (0.5,) * 3), 8)

    def test_other_weights_have_another_fingerprint(self, weights):
        torch.manual_seed(1)
        torch.save(timm.create_model("small_cnn").state_dict(), "other.pt")
        prints = [
            FrozenFeatures(load_pretrained("small_cnn", file), 24).fingerprint() for file in (weights, "other.pt")
        ]
        again = FrozenFeatures(load_pretrained("small_cnn", weights), 24).fingerprint()
        assert prints[0] == again != prints[1]


class TestDataModules:
    DIGITS = ("--data", "Digits", "--data.max_train_samples", "200", "--data.noise.kind", "symmetric_exclusive",
              "--data.noise.rate", "0.2", "--data.seed", "3")  # fmt: skip

    def test_labels_are_those_of_a_training_and_rows_are_named_by_index(self, audit):
        from sanm_lightning import Noise
        from sanm_lightning.data import Digits

        data = Digits(max_train_samples=200, noise=Noise("symmetric_exclusive", 0.2), seed=3)
        out = audit(*self.DIGITS)
        with (out / "label_issues.csv").open() as file:
            assert file.readline().startswith("index,split,given_label,")
        rows = table(out)
        index = data.table("train").origin.tolist()
        assert {int(number) for number in rows} == set(index)
        assert [int(rows[str(number)]["given_label"]) for number in index] == data.labels.tolist()
        wrong = {str(number) for number, bad in zip(index, data.labels != data.true_labels, strict=True) if bad}
        assert len(wrong & set(list(rows)[:40])) > 30
        assert {row["split"] for row in rows.values()} == {"train"}

    def test_the_test_split_is_audited_by_itself(self, audit):
        out = audit("--data", "Digits", "--split", "test")
        assert {row["split"] for row in table(out).values()} == {"test"}

    def test_an_unreadable_file_of_a_data_module_is_kept_with_its_reason(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        (root / "train/red/red4.png").write_bytes(b"no image")
        options = ["--data", "ImageFolder", "--data.root", str(root), "--data.image_size", "24"]
        out = audit(*options)
        rows = table(out)
        assert len(rows) == 36
        assert list(rows)[-1] == "train/red/red4.png"
        assert rows["train/red/red4.png"]["neighbor_labels"].startswith("unreadable: cannot identify image")
        issues = read_label_issues(out / "label_issues.csv")
        assert {issues.paths[row] for row in issues.order()[:3]} == {
            "train/green/blue0.png", "train/red/green0.png", "train/blue/red0.png",
        }  # fmt: skip

    def test_a_wrong_split_and_foreign_data_are_refused(self, audit):
        with pytest.raises(
            ValueError, match="expected the split 'train', 'val' or 'test', got 'all'; choose one of them"
        ):
            audit("--data", "Digits", "--split", "all")
        with pytest.raises(ValueError, match="expected a data module with labels by index, got LightningDataModule"):
            audit("--data", "lightning.LightningDataModule")


class TestCommand:
    def test_the_exit_status_is_that_of_the_share_of_wrong_labels(self, tmp_path, audit, capsys):
        root = folder(tmp_path / "root")
        share = summary(audit(root))["noise_rate"]
        audit(root, "--fail_over", str(share + 0.001))
        audit(root, "--fail-over", str(share - 0.001), status=1)
        assert f"{share:.2%} exceeds --fail_over" in capsys.readouterr().out
        audit(root, f"--fail-over={share - 0.001}", status=1)
        with pytest.raises(ValueError, match=r"expected fail_over in \[0, 1\], got 5.0; use 0.05 for 5 %"):
            audit(root, "--fail-over", "5")

    def test_a_baseline_leaves_what_is_new(self, tmp_path, audit, capsys):
        root = folder(tmp_path / "root")
        old = audit(root) / "label_issues.csv"
        new = audit(root, "--baseline", old, "--fail-over", "0") / "new_issues.csv"
        assert new.read_text().splitlines() == ["path,split,given_label,suggested_label,quality"]
        assert "0 issues not in the baseline" in " ".join(capsys.readouterr().out.split())
        save(root / "train/blue/more.png", "red", 600)
        (root / "train/red/green0.png").rename(root / "train/blue/green0.png")  # wrong, and now in another way
        out = audit(root, "--baseline", old, "--fail-over", "0.03", status=1)
        with (out / "new_issues.csv").open() as file:
            found = {row["path"]: row["suggested_label"] for row in csv.DictReader(file)}
        assert found == {"train/blue/more.png": "red", "train/blue/green0.png": "green"}
        audit(root, "--baseline", old, "--fail-over", "0.05")  # 2 of 49

    def test_a_baseline_of_another_data_set_is_refused_before_any_work(self, tmp_path, audit):
        old = audit(folder(tmp_path / "root"), "--image_size", "24") / "label_issues.csv"
        sentence = (
            r"got 48 samples, none of which is among the 36 of this audit \(such as \['train/.*'\] and \['blue/.*'\]\)"
        )
        with pytest.raises(ValueError, match=sentence):
            audit(tmp_path / "root/train", "--baseline", old, "--out", "there")
        with pytest.raises(ValueError, match="none of which is among the 64 of this audit"):
            audit("--data", "Toy", "--baseline", old, "--out", "there")
        assert not Path("there").exists()

    def test_the_verdict_is_one_line_in_a_log(self, tmp_path, audit, capsys):
        audit(folder(tmp_path / "root"))
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("about ")]
        assert "most frequent: given 'green', suggested 'blue'" in line

    def test_without_out_each_audit_has_a_folder_of_its_own(self, tmp_path, weights):
        root = folder(tmp_path / "root")
        words = ["audit", str(root), "--network", "small_cnn", "--checkpoint", weights, "--cache", "cache"]
        words += ["--num_workers", "0"]
        assert [run(words), run(words)] == [0, 0]
        assert sorted(os.listdir("audits")) == ["version_0", "version_1"]

    def test_the_cache_is_in_the_users_own_folder_by_default(self, tmp_path, weights, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        root = folder(tmp_path / "root")
        run(["audit", str(root), "--network", "small_cnn", "--checkpoint", weights, "--num_workers", "0"])
        assert len(list((tmp_path / "own").glob("sanm_lightning/features/*/part-*.npz"))) == 1

    def test_the_encoder_of_a_run_serves(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["sanm"])
        main([
            "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
            "--data", "Toy", "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.max_epochs", "1",
            "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
            "--trainer.default_root_dir", "fitted",
        ])  # fmt: skip
        (checkpoint,) = Path("fitted").rglob("last.ckpt")
        words = [str(folder(tmp_path / "root")), "--num_workers", "0", "--cache", "cache"]
        assert run(["audit", *words, "--checkpoint", str(checkpoint), "--out", "out"]) == 0
        assert np.load("out/features.npy").shape == (48, 16)
        assert summary(Path("out"))["image_size"] == 16
        with pytest.raises(ValueError, match="expected the network of the checkpoint, 'small_cnn', got 'resnet18'"):
            run(["audit", *words, "--checkpoint", str(checkpoint), "--network", "resnet18", "--out", "out2"])

    @pytest.mark.skipif(packaged_weights("tf_efficientnet_lite0") is None, reason="the extra 'pretrained' is missing")
    def test_the_packaged_network_needs_no_download(self, tmp_path, monkeypatch):
        import socket

        monkeypatch.setattr(socket, "socket", None)
        root = folder(tmp_path / "root", per_class=6, splits=("train",))
        assert run(["audit", str(root), "--image_size", "32", "--cache", "cache", "--num_workers", "0"]) == 0
        assert np.load("audits/version_0/features.npy").shape == (18, 1280)
        assert summary(Path("audits/version_0"))["network"] == "tf_efficientnet_lite0"


class TestRefused:
    def refused(self, audit, sentence: str, *words: object) -> None:
        with pytest.raises((ValueError, OSError), match=sentence):
            audit(*words, "--out", "out")
        assert not Path("out").exists()

    def test_a_folder_that_is_missing_empty_or_of_one_class(self, tmp_path, audit):
        self.refused(audit, "expected a folder", tmp_path / "missing")
        (tmp_path / "root/a").mkdir(parents=True)
        (tmp_path / "root/b").mkdir()
        self.refused(audit, "expected images of two or more classes in .*, got 0 of 0", tmp_path / "root")
        save(tmp_path / "root/a/1.png", "red", 0)
        self.refused(audit, "expected images of two or more classes in .*, got 1 of 1", tmp_path / "root")

    def test_without_out_it_leaves_no_folder(self, tmp_path, weights):
        with pytest.raises(ValueError, match="expected a device"):
            run(
                [
                    "audit",
                    str(folder(tmp_path / "root")),
                    "--network",
                    "small_cnn",
                    "--checkpoint",
                    weights,
                    "--device",
                    "x",
                ]
            )
        assert not Path("audits").exists()

    def test_too_little_that_can_be_read(self, tmp_path, audit):
        root = folder(tmp_path / "root", splits=("train",))
        for path in sorted(root.rglob("*.png"))[8:]:
            path.write_bytes(b"no image")
        self.refused(audit, r"ten readable images .*, got 8 of 1; 28 unreadable, such as 'train/", root)

    def test_a_training_split_of_one_class(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        shutil.rmtree(root / "train/red")
        shutil.rmtree(root / "train/blue")
        self.refused(audit, r"to learn from, of two classes or more, got 12 of 1; add images", root)

    def test_a_training_split_of_nine_however_many_there_are_for_testing(self, tmp_path, audit):
        root = folder(tmp_path / "root", per_class=3)
        self.refused(audit, r"ten readable images to learn from, of two classes or more, got 9 of 3; add images", root)

    def test_a_set_of_one_class(self):
        pool = AuditSet(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), np.zeros(20, np.int64), ["a", "b"], ["all"] * 20)
        with pytest.raises(ValueError, match="expected images of two classes or more, got 1; add classes"):
            audit_set(pool)

    def test_results_that_would_be_a_class_of_the_next_audit(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        sentence = "expected a folder outside of '.*train', whose folders are classes, got '.*'; use another --"
        for out in (root / "train/mine", root / "train/blue/mine"):
            with pytest.raises(ValueError, match=sentence + "out"):
                audit(root / "train", "--out", out)
        data = ("--data", "ImageFolder", "--data.root", str(root), "--data.image_size", "24")
        with pytest.raises(ValueError, match=sentence + "out"):
            audit(*data, "--out", root / "train/mine")
        for number, of in enumerate(((root / "train",), (root,), data)):
            words = ["relabel", str(audit(*of)), "--below", "0.1"]
            with pytest.raises(ValueError, match=sentence + "linked"):
                run([*words, "--linked", str(root / "train/fixed")])
            with pytest.raises(ValueError, match=sentence + "out"):
                run([*words, "--out", str(root / "train/labels/labels.csv")])
            assert sorted(os.listdir(root / "train")) == sorted(COLORS)
            assert run([*words, "--linked", str(root / f"fixed{number}")]) == 0
            assert run([*words, "--out", str(root / f"labels{number}/labels.csv")]) == 0

    def test_results_that_exist_are_never_overwritten(self, tmp_path, audit):
        root = folder(tmp_path / "root")
        Path("there").mkdir()
        Path("there/mine").write_text("mine")
        with pytest.raises(FileExistsError, match="expected a new folder in 'there', got one with files; use another"):
            audit(root, "--out", "there")
        with pytest.raises(FileExistsError, match="expected a new folder in 'there/mine'"):
            audit(root, "--out", "there/mine")
        assert os.listdir("there") == ["mine"]

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (("--device", "nowhere"), "expected a device such as cpu or cuda, got 'nowhere'"),
            (("--batch_size", "0"), "expected batch_size of 1 or more, got 0"),
            (("--image_size", "-3"), "expected image_size of 1 or more, got -3"),
            (("--num_workers", "-1"), "expected num_workers of 0 or more, got -1"),
        ],
    )
    def test_options_out_of_range(self, tmp_path, audit, words, sentence):
        self.refused(audit, sentence, folder(tmp_path / "root"), *words)

    def test_neither_or_both_of_folder_and_data(self, tmp_path, audit):
        self.refused(audit, "expected a folder or a data module, got neither; use")
        self.refused(audit, "expected a folder or a data module, got both; use", tmp_path, "--data", "Digits")

    def test_a_network_that_does_not_exist_and_weights_of_another(self, tmp_path, weights):
        root = folder(tmp_path / "root", splits=("train",))
        words = ["audit", str(root), "--cache", "cache", "--num_workers", "0", "--out", "out"]
        with pytest.raises(ValueError, match="expected the name of a timm model, got 'resnet_of_mine'"):
            run([*words, "--network", "resnet_of_mine"])
        with pytest.raises(ValueError, match=r"expected weights for 'test_resnet' in .* that does not fit"):
            run([*words, "--network", "test_resnet", "--checkpoint", weights])
        with pytest.raises(FileNotFoundError, match=r"expected a weight file.*none\.pt"):
            run([*words, "--network", "test_resnet", "--checkpoint", "none.pt"])
        with pytest.raises(ValueError, match=r"got '.*' alone; set the name of the network"):
            run([*words, "--checkpoint", weights])
        assert not Path("out").exists()

    def test_mistakes_end_in_a_sentence_and_status_2(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["sanm", "audit", "missing"])
        with pytest.raises(SystemExit) as exit:
            entry_point()
        assert exit.value.code == 2
        assert capsys.readouterr().err.startswith("sanm: expected a folder")


def test_classes_of_fewer_than_five_images_are_named(tmp_path, audit):
    root = folder(tmp_path / "root", splits=("train",))
    for i in range(3):
        save(root / "train/purple" / f"{i}.png", "red", 900 + i)
    notes = summary(audit(root))["notes"]
    assert "Classes with fewer than 5 readable images, whose labels cannot be assessed: 'purple' (3)." in notes


def test_a_listing_of_class_folders_alone_is_one_split(tmp_path):
    for i in range(2):
        save(tmp_path / "root/a" / f"{i}.png", "red", i)
        save(tmp_path / "root/b" / f"{i}.png", "blue", i)
    pool = folder_audit_set(tmp_path / "root")
    assert pool.splits == ["all"] * 4
    assert pool.paths == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert pool.images == [tmp_path / "root" / path for path in pool.paths]
    assert pool.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("content", [b"nonsense", b""])
def test_the_reason_of_an_unreadable_file_is_the_same_in_every_run(tmp_path, audit, content):
    root = folder(tmp_path / "root")
    (root / "train" / "red" / "broken.png").write_bytes(content)
    rows = [table(audit(root))["train/red/broken.png"]["neighbor_labels"] for _ in range(2)]
    assert rows[0] == rows[1] == "unreadable: cannot identify image file"


class TestNoiseRate:
    def test_a_folder_and_its_file_are_read(self, tmp_path, audit):
        out = audit(folder(tmp_path / "root"))
        assert read_noise_rate(out) == read_noise_rate(out / "audit.json") == summary(out)["noise_rate"]

    @pytest.mark.parametrize("content", ["[]", "{}", '{"noise_rate": null}', "no json"])
    def test_another_file_is_refused(self, tmp_path, content):
        (tmp_path / "audit.json").write_text(content)
        with pytest.raises(ValueError, match=r"expected audit\.json of an audit"):
            read_noise_rate(tmp_path)

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="run sanm audit first"):
            read_noise_rate(tmp_path)

    @pytest.mark.parametrize("form", ["{} {}", "{}={}"])
    @pytest.mark.parametrize("option", ["--model.noise_rate", "--model.init_args.noise_rate"])
    def test_the_command_line_takes_it_from_an_audit(self, tmp_path, form, option):
        (tmp_path / "audit.json").write_text('{"noise_rate": 0.25}')
        words = [
            "fit",
            *form.format(option, tmp_path).split(),
            "--model.noise_rate",
            "0.5",
            "--model.noise_rate",
            "null",
        ]
        expected = [
            "fit",
            *form.format(option, 0.25).split(),
            "--model.noise_rate",
            "0.5",
            "--model.noise_rate",
            "null",
        ]
        assert _read_noise_rate(words) == expected
