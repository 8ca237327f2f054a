"""Class names are in checkpoints; data with other classes, or another order of them, are refused by name."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sanm_lightning import CSVImages
from sanm_lightning.audit import LabelAudit
from sanm_lightning.class_names import named_classes, real_names, refuse_other_classes
from sanm_lightning.cli import entry_point, main
from sanm_lightning.data import Toy
from sanm_lightning.methods import CrossEntropy
from sanm_lightning.run.record import RunRecord
from tests.methods.toy import trainer

RUN = [
    "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.enable_model_summary", "false",
    "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 8}",
    "--model.warmup_epochs", "0", "--data", "ImageFolder",
    "--data.image_size", "16", "--data.crop_padding", "0",
]  # fmt: skip


class TestCompare:
    def test_only_real_names_are_names(self) -> None:
        assert real_names(["0", "1", "2"]) is None and real_names(None) is None and real_names("abc") is None
        assert real_names(["1", "2"]) == ["1", "2"] and real_names(("a", "b")) == ["a", "b"]
        assert named_classes(Toy()) is None and named_classes(object()) is None

    def test_the_same_or_unknown_names_pass(self) -> None:
        refuse_other_classes(["a", "b"], ["a", "b"])
        refuse_other_classes(None, ["a", "b"])
        refuse_other_classes(["a", "b"], None)

    @pytest.mark.parametrize(
        ("now", "match"),
        [
            (
                ["bee", "cat", "yellow"],
                "expected the 3 classes of the checkpoint, got 'yellow' only in the data and 'ant' only in",
            ),
            (["ant", "bee"], "got 'cat' only in the checkpoint; use"),
            (["ant", "bee", "cat", *"defghi"], "got 'd', 'e', 'f', 'g', 'h' and 1 more only in the data; use"),
            (["bee", "ant", "cat"], "the same names in another order, with class 0 'bee' instead of 'ant'"),
        ],
    )
    def test_other_classes_are_named(self, now: list[str], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            refuse_other_classes(now, ["ant", "bee", "cat"])


def pictures(root: Path, *classes: str) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image.save(root / part / name / f"{number}.png")
    return root


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One epoch on the classes ant, bee and cat."""
    monkeypatch.setattr(sys, "argv", ["sanm"])
    root = pictures(tmp_path / "A", "ant", "bee", "cat")
    main(["fit", *RUN, "--data.root", str(root)]).trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def on(root: Path, command: str, checkpoint: Path) -> Any:
    epochs = ["--trainer.max_epochs", "2"] if command == "fit" else []
    return main([command, *RUN, *epochs, "--data.root", str(root), "--ckpt_path", str(checkpoint)])


class TestARenamedFolder:
    """The second of the shared cases: the same pictures, one class folder renamed, so that the others move up."""

    @pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
    def test_ends_in_a_sentence(self, tmp_path: Path, checkpoint: Path, command: str) -> None:
        for part in ("train", "test"):
            (tmp_path / "A" / part / "ant").rename(tmp_path / "A" / part / "yellowjacket")
        with pytest.raises(
            ValueError, match="got 'yellowjacket' only in the data and 'ant' only in the checkpoint"
        ) as error:
            on(tmp_path / "A", command, checkpoint)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("command", ["fit", "test"])
    def test_the_same_names_go_on(self, tmp_path: Path, checkpoint: Path, command: str) -> None:
        on(tmp_path / "A", command, checkpoint)

    def test_one_class_more(self, tmp_path: Path, checkpoint: Path) -> None:
        with pytest.raises(ValueError, match="got 'dog' only in the data"):
            on(pictures(tmp_path / "B", "ant", "bee", "cat", "dog"), "test", checkpoint)

    def test_the_command_line_says_it(
        self, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        root = pictures(tmp_path / "B", "bee", "cat", "yellowjacket")
        words = ["test", *RUN, "--data.root", str(root), "--ckpt_path", str(checkpoint)]
        monkeypatch.setattr(sys, "argv", ["sanm", *words])
        with contextlib.suppress(SystemExit):
            entry_point()
        assert "sanm: expected the 3 classes of the checkpoint, got 'yellowjacket'" in capsys.readouterr().err


class TestOtherWays:
    def test_the_names_are_there_for_whoever_has_the_checkpoint_alone(self, checkpoint: Path, tmp_path: Path) -> None:
        assert torch.load(checkpoint, weights_only=True)["class_names"] == ["ant", "bee", "cat"]
        model = CrossEntropy.load_from_checkpoint(checkpoint, weights_only=True)
        assert model.class_names == ["ant", "bee", "cat"]
        run = trainer(1)
        run.strategy.connect(model)
        run.save_checkpoint(tmp_path / "b.ckpt", weights_only=True)
        assert torch.load(tmp_path / "b.ckpt", weights_only=True)["class_names"] == ["ant", "bee", "cat"]

    def test_another_data_module_is_compared_too(self, checkpoint: Path, tmp_path: Path) -> None:
        model = CrossEntropy.load_from_checkpoint(checkpoint, weights_only=True)
        for names in (["ant", "bee", "cat"], ["ant", "bee", "cow"]):
            rows = "".join(
                f"A/test/{old}/0.png,{new},test\n" for old, new in zip(("ant", "bee", "cat"), names, strict=True)
            )
            (tmp_path / "my.csv").write_text("path,label,split\n" + rows)
            data = CSVImages(str(tmp_path / "my.csv"), split_column="split", image_size=16)
            if names[2] == "cat":
                trainer(1, callbacks=[RunRecord(), LabelAudit()]).test(model, data, ckpt_path=checkpoint, verbose=False)
            else:
                with pytest.raises(ValueError, match="got 'cow' only in the data and 'cat' only in the checkpoint"):
                    trainer(1, callbacks=[RunRecord(), LabelAudit()]).test(
                        model, data, ckpt_path=checkpoint, verbose=False
                    )

    def test_a_module_that_is_not_of_this_package(self, checkpoint: Path, tmp_path: Path) -> None:
        held = torch.load(checkpoint, weights_only=True)
        del held["class_names"]  # the state of the data module alone
        torch.save(held, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match="got 'dog' only in the data and 'cat' only in the checkpoint"):
            on(pictures(tmp_path / "B", "ant", "bee", "dog"), "test", tmp_path / "b.ckpt")

    def test_earlier_checkpoints_load_as_before(self, checkpoint: Path, tmp_path: Path) -> None:
        held = torch.load(checkpoint, weights_only=True)
        del held["class_names"], held["ImageFolder"]["class_names"]
        torch.save(held, tmp_path / "b.ckpt")
        root = pictures(tmp_path / "B", "bee", "cat", "yellowjacket")
        on(root, "test", tmp_path / "b.ckpt")
