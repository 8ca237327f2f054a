"""Options of a study are checked by the parser of ``sanm fit`` before a cell is run."""

import os
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import FitParser
from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.study.cells import cells_of
from sanm_lightning.study.options import check_options
from sanm_lightning.study.schema import read_study
from tests.full import FULL

STUDIES = sorted((packaged() / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def check(write):
    def make(**keys) -> None:
        study = read_study(write(**keys))
        check_options(study.name, cells_of(study))

    return make


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"options": {"model.wieght": 1.0}},
            "expected an option of CrossEntropy in the cell 'cross_entropy/base/cifar10/sym50/seed1' of the study 'own', "
            "got 'model.wieght'; ",
        ),
        (
            {"method_options": {"elr": {"model.wieght": 1.0}}},
            "expected an option of ELR in the cell 'elr/base/cifar10/sym50/seed1' of the study 'own', got 'model.wieght'; "
            "near: model.weight",
        ),
        (
            {"options": {"trainer.max_epoch": 3}},
            "expected an option of sanm fit in the cell 'cross_entropy/base/cifar10/sym50/seed1' of the study 'own', "
            "got '--trainer.max_epoch'; near: --trainer.max_epochs",
        ),
        ({"options": {"data.batchsize": 3}}, "expected an option of CIFAR10 in the cell .* got 'data.batchsize'; near:"),
        ({"options": {"trainer.max_epochs": "many"}}, "expected .* in the cell .* of the study 'own', got .*many"),
        ({"known_rate": ["elr"]}, "expected an option of ELR in the cell .*, got 'model.noise_rate'; "),
        ({"methods": ["elr"], "pretraining": {"elr": "simclr"}}, "expected an option of ELR .*, got 'model.pretrained'; "),
    ],
)  # fmt: skip
def test_an_option_that_fit_refuses_is_refused_with_its_cell_and_study(check, keys, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        check(**keys)


def test_a_dry_run_refuses_before_it_measures_or_writes(write, typed, monkeypatch):
    monkeypatch.setattr("sanm_lightning.commands.study.forward_passes", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"expected an option of sanm fit .*, got '--trainer\.epochs'; "):
        typed("study", write(options={"trainer.epochs": 3}), "--out", "out", "--dry-run")
    assert not Path("out").exists()


def test_cells_that_differ_in_noise_and_seed_are_parsed_once(check, monkeypatch):
    parsed: list[list[str]] = []
    monkeypatch.setattr(FitParser, "check", lambda self, words: parsed.append(words))
    check(
        methods=["elr"],
        noise=["sym20", "sym50", "sym80"],
        seeds=[1, 2, 3],
        method_options={"elr": {"model.weight": 3.0}},
    )
    assert len(parsed) == 2  # base and SANM
    assert all(words[words.index("--model.weight") + 1] == "3.0" for words in parsed)


def test_cells_without_options_need_no_parser(check, monkeypatch):
    monkeypatch.setattr(FitParser, "__init__", lambda self: pytest.fail("made a parser"))
    check(options={})


def test_random_streams_are_unchanged(check, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = torch.get_rng_state()
    check()
    assert torch.equal(torch.get_rng_state(), before)
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.parametrize("path", [path for path in STUDIES if FULL or path.stem == "smoke"], ids=lambda path: path.stem)
def test_the_options_of_a_packaged_study_are_accepted(path):
    study = read_study(path)
    check_options(study.name, cells_of(study))
