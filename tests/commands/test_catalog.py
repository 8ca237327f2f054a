"""sanm list: what the package contains, read from its configs, classes and results."""

import json
import os
import re
import sys

import pytest
import yaml

from sanm_lightning import methods
from sanm_lightning.cli import entry_point
from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.commands import catalog, run

CONFIGS = packaged() / "configs"


def column(what: str, number: int = 0) -> list[str]:
    return [row[number] for row in catalog.catalog(what)[1:]]


def test_lists_every_method_with_its_class_and_a_source_of_a_year():
    rows = catalog.catalog("methods")[1:]
    assert [row[0] for row in rows] == sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
    for name, kind, source, _ in rows:
        assert yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())["model"]["class_path"] == kind
        assert issubclass(getattr(methods, kind), methods.NoisyLabelModule)
        assert re.search(r"\b(19|20)\d\d\)?$", source), name


def test_names_the_results_files_with_runs_of_a_method(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.setattr(catalog, "packaged", lambda: tmp_path)
    assert set(column("methods", 3)) == {"none"}
    found = {
        "a": {"results": [{"method": "CDR"}]},
        "b": {"runs": {"cdr": 1, "elr_plus_sanm": 2}},
        "c": {"note": "as CDR"},
    }
    found["d"] = {"runs": {"1": {"words": "--model DivideMix"}}}  # AugDesc is a config of the same class
    found["e"] = {"runs": {"AugDesc_sanm": 1}}
    found["f"] = {"runs": {"dividemix_human": 1, "unknown_elr": 2}}
    for name, content in found.items():
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))
    runs = dict(zip(column("methods"), column("methods", 3), strict=True))
    assert {name: files for name, files in runs.items() if files != "none"} == {
        "augdesc": "e", "cdr": "a, b", "dividemix": "d, f", "elr_plus": "b",
    }  # fmt: skip


def test_lists_every_config_once_with_the_first_sentence_of_its_comment():
    rows = catalog.catalog("configs")[1:]
    assert sorted(row[0] for row in rows) == sorted(
        f"configs/{path.relative_to(CONFIGS)}" for path in CONFIGS.rglob("*.yaml")
    )
    for path, sentence in rows:
        comment = " ".join((CONFIGS.parent / path).read_text().replace("\n#", "").split())
        assert sentence and f"# {sentence}" in comment, path
        assert "sanm fit" not in sentence


@pytest.mark.parametrize(("what", "folder"), [(w, f) for w, f in catalog.FOLDERS.items()])
def test_lists_a_folder_of_configs(what, folder):
    assert column(what) == sorted(f"configs/{path.relative_to(CONFIGS)}" for path in (CONFIGS / folder).rglob("*.yaml"))


def test_prints_aligned_columns_and_methods_by_default(capsys):
    assert run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines[0].index("class")
    assert lines[0].startswith("method ") and all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert run(["list", "sanm"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("configs/sanm.yaml ")


@pytest.mark.parametrize("what", ["studies", "settings"], ids=["less than a buffer", "more than a buffer"])
def test_a_reader_that_ends_first_is_no_error(monkeypatch, capfd, what):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["sanm", "list", what])
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stopped:
            entry_point()
    assert stopped.value.code == 1 and capfd.readouterr().err == ""


def test_says_that_there_are_none(monkeypatch, capsys, tmp_path):
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(catalog, "packaged", lambda: tmp_path)
    assert run(["list", "studies"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"no studies in {tmp_path / 'configs'}"


@pytest.mark.parametrize(("word", "near"), [("nosie", "noise"), ("zzz", "methods")])
def test_refuses_another_list(word, near):
    with pytest.raises(ValueError, match=rf"expected one of methods, .*, got '{word}'; use 'sanm list {near}'"):
        run(["list", word])
