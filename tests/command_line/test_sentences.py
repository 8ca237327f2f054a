"""Errors of the parser, of workers and of processes, as the sentence that their cause says; and the help."""

import re
import sys
import traceback
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import entry_point, main
from sanm_lightning.command_line.sentences import sentence
from sanm_lightning.commands import COMMANDS
from tests.test_cli import SMALL, TOY

FIT = ["fit", *SMALL, *TOY]
FURTHER = [name for name in COMMANDS if " " not in name]


def said(monkeypatch, capsys, *words: str) -> str:
    """Return the sentence of a refused command, which is all that it writes to stderr."""
    monkeypatch.setattr(sys, "argv", ["sanm", *words])
    with pytest.raises(SystemExit) as end:
        entry_point()
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("INFO: Seed")]
    assert len(lines) == 2, lines
    assert lines[1] == "(SANM_TRACEBACK=1 shows where)"
    assert re.match(r"sanm: expected .+, got .+; ", lines[0]), lines[0]
    return lines[0].removeprefix("sanm: ")


class TestParser:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--model.netwrk", "cnn9"], "expected an option of CrossEntropy, got 'model.netwrk'; near: model.network"),
            (["--model", "CrosEntropy"], "expected the name of a class for model, got 'CrosEntropy'; near: CrossEntropy"),
            (["--data", "CIFAR1"], "expected the name of a class for data, got 'CIFAR1'; near: CIFAR10, CIFAR10N, CIFAR100"),
            (["--model", "Unknown"], "expected the name of a class for model, got 'Unknown'; choose one of ActiveBias, C2D,"),
            (["--model.sanm", "SAN"], "expected the name of a class for model.sanm, got 'SAN'; near: SANM"),
            (["--model.sanm", "SANM", "--model.sanm.muu", "1"], "expected an option of SANM, got 'model.sanm.muu'; near: m"),
            (["--model.optimizer", "SDG"], "expected the name of a class for model.optimizer, got 'SDG'; near: SGD"),
            (["--model.optimizer", "SGD", "--model.optimizer.lrr", "1"], "expected an option of SGD, got 'model.optimizer."),
            (["--data.noise.knd", "pair"], "expected an option of Toy, got 'data.noise.knd'; near: data.noise.kind"),
            (["--trainr.max_epochs", "3"], "expected an option of sanm fit, got '--trainr.max_epochs'; near: --trainer.max_e"),
            (["--trainer.max_epoch", "3"], "expected an option of sanm fit, got '--trainer.max_epoch'; near: --trainer.max_ep"),
            (["--ckpt_pth", "a"], "expected an option of sanm fit, got '--ckpt_pth'; near: --ckpt_path"),
            (["--trainer.max_epochs", "two"], "expected trainer.max_epochs of type int or null, got 'two'; use a value of"),
            (["--model.warmup_epochs", "two"], "expected model.warmup_epochs of type int, got 'two'; use a value of this"),
            (["--data.noise.kind", "piar"], "expected data.noise.kind to be one of 'none', 'symmetric', "),
            (["--model", "torch.optim.SGD"], "expected a subclass of LightningModule for model, got 'torch.optim.SGD'; use"),
            (["--model", "no_such.Mine"], "expected an importable class for model, got 'no_such.Mine' (No module named "),
            (["--trainer.max_epochs"], "expected one argument after --trainer.max_epochs, got none; see 'sanm fit --help'"),
            (["--model.help", "CrossEntrpy"], "expected the name of a class for model, got 'CrossEntrpy'; near: CrossEntropy"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )  # fmt: skip
    def test_says_what_was_expected_and_what_is_near(self, monkeypatch, capsys, words, expected):
        assert said(monkeypatch, capsys, *FIT, *words).startswith(expected)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ("modl: {class_path: CrossEntropy}", "expected an option of sanm fit, got 'modl.class_path'; near: model"),
            ("trainer: {max_epoch: 3}", "expected an option of sanm fit, got 'trainer.max_epoch'; near: trainer.max_epochs"),
            ("model: {class_path: ELR, init_args: {sanm: {class_path: SANM, init_args: {muu: 1}}}}", "expected an option of S"),
            ("data: {class_path: Toy, init_args: {noise: {knd: pair}}}", "expected an option of Toy, got 'data.noise.knd'; n"),
            ("data: {class_path: Toy, init_args: 3}", "expected options by name in init_args of data, got a value of type int"),
            ("model: [", "expected configs in valid YAML, got a file that cannot be parsed (while parsing"),
            ('trainer: "{max_epochs: 1"', "expected options in valid YAML under 'trainer', got '{max_epochs: 1', which cannot"),
            ("trainer: abc", "expected options under 'trainer', got 'abc'; use a mapping, or the path of a config"),
            ('trainer: "max_epochs: two"', "expected trainer.max_epochs of type int or null, got 'two'; use a value of"),
        ],
        ids=["section", "trainer", "nested", "group", "number", "not YAML", "text not YAML", "word", "text of options"],
    )  # fmt: skip
    def test_says_it_of_configs_too(self, monkeypatch, capsys, config, expected):
        Path("mine.yaml").write_text(config)
        assert said(monkeypatch, capsys, *FIT, "--config", "mine.yaml").startswith(expected)

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("fti", f"expected a command among fit, validate, test, predict, {', '.join(FURTHER)}, got 'fti'"),
            ("", "expected a command among fit, "),
            ("fit", "expected a value for --model and --data, got none; see 'sanm fit --help'"),
            ("audit --data NoSuch", "expected the name of a class for data, got 'NoSuch'; choose one of Animal10N, CIFAR10, "),
            ("audit x --batch_size two", "expected batch_size of type int, got 'two'; use a value of this type"),
            ("audit x --see 3", "expected an option of sanm audit, got '--see'; near: --seed"),
            ("audit x --seeed 3", "expected an option of sanm audit, got '--seeed'; near: --seed"),
            ("export --out x", "expected a value for --ckpt_path, got none; see 'sanm export --help'"),
            ("export --ckpt_path x --out y --format onx", "expected --format among safetensors, torch, onnx, got 'onx'; near:"),
            ("audit --data.file x", "expected the class of the data before its options, got 'data.file'; add --data CLASS"),
            ("relabel --undoo x", "expected an option of sanm relabel, got '--undoo'; near: --undo"),
        ],
    )  # fmt: skip
    def test_says_it_of_every_command(self, monkeypatch, capsys, words, expected):
        assert said(monkeypatch, capsys, *words.split()).startswith(expected)

    def test_an_interruption_ends_without_a_traceback(self, monkeypatch, capsys):
        def interrupted(words):
            raise KeyboardInterrupt

        monkeypatch.setattr("sanm_lightning.commands.run", interrupted)
        with pytest.raises(SystemExit) as end:
            entry_point()
        assert (end.value.code, capsys.readouterr().err) == (130, "sanm: interrupted\n")

    def test_says_the_value_alone_for_an_option_of_a_function(self, monkeypatch, capsys):
        words = ["--model.optimizer", "SGD", "--model.optimizer.lr", "x"]
        expected = "expected model.optimizer.lr of type float or Tensor, got 'x'; use a value of this type"
        assert said(monkeypatch, capsys, *FIT, *words) == expected

    def test_lets_the_sentence_of_a_data_module_through_a_link(self, monkeypatch, capsys):
        assert said(monkeypatch, capsys, "fit", *SMALL, "--data", "ImageFolder", "--data.root", "nowhere").startswith(
            "expected a folder of class folders in 'nowhere', got no such folder; "
        )


class TestProcesses:
    def test_the_sentence_of_a_worker_stands_alone(self, monkeypatch, capsys):
        from tests.test_class_names import pictures

        root = pictures(Path("A"), "ant", "bee")
        broken = next((root / "train" / "bee").iterdir())
        broken.write_bytes(broken.read_bytes()[:60])
        folder = [
            "--data",
            "ImageFolder",
            "--data.root",
            str(root),
            "--data.image_size",
            "12",
            "--data.num_workers",
            "1",
        ]
        quiet = [*TOY[TOY.index("--trainer.accelerator") :], "--data.resident_bytes", "0"]
        found = said(monkeypatch, capsys, "fit", *SMALL, *folder, *quiet)
        assert found.startswith(f"expected a valid image, got '{broken}', which cannot be decoded (")

    @pytest.mark.parametrize(("kind", "stands"), [(ValueError, True), (FileNotFoundError, True), (RuntimeError, False)])
    def test_the_sentence_of_a_spawned_process_stands_alone(self, kind, stands):
        """An error of the program keeps its traceback; the text is that of torch, with a real traceback."""
        message = "expected one, got two;\nuse one"
        try:
            raise kind(message)
        except Exception:
            text = f"\n\n-- Process 1 terminated with the following error:\n{traceback.format_exc()}"
        assert sentence(torch.multiprocessing.ProcessRaisedException(text, 1, 1234)) == (message if stands else None)


class TestHelp:
    def test_of_a_method_is_its_arguments_without_the_subclasses_of_module(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["sanm"])
        with pytest.raises(SystemExit):
            main(["fit", "--model.help", "CrossEntropy"])
        shown = capsys.readouterr().out
        for name in ("network", "network_args", "sanm", "warmup_epochs", "optimizer", "scheduler"):
            assert f"--model.{name} " in shown
        assert "torch.nn." not in shown
        assert "OneCycle" in shown, "classes for other options are listed"
        assert shown.count("\n") < 150

    def test_of_a_nested_class_has_the_names_to_type(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["sanm"])
        with pytest.raises(SystemExit):
            main(["fit", "--model", "CrossEntropy", "--model.sanm", "SANM", "--model.sanm.quality.help=FeatureQuality"])
        shown = capsys.readouterr().out
        assert "Help for --model.sanm.quality.help=" in shown
        assert "\n  --model.sanm.quality.every EVERY" in shown
        assert not re.search(r"--(sanm|quality)\.", shown)

    @pytest.mark.parametrize("command", ["fit", "audit", "check-data", "noise"])
    def test_of_a_command_lists_public_classes_under_headings(self, monkeypatch, capsys, command):
        monkeypatch.setattr(sys, "argv", ["sanm", command, "--help"])
        with pytest.raises(SystemExit):
            entry_point()
        shown = capsys.readouterr().out
        assert "data module:" in shown and "DataModule standardizes" not in shown
        assert "sanm_lightning.ImageFolder" in shown
        assert not re.search(r"sanm_lightning\.\w+\.\w+\.\w+", shown)

    def test_of_a_data_module_is_without_the_data_sets_of_torch(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["sanm"])
        with pytest.raises(SystemExit):
            main(["fit", "--data.help", "FromDataset"])
        shown = capsys.readouterr().out
        assert "--data.train " in shown and "torch.utils.data" not in shown
