"""``--weights FILE`` starts a new run from given weights; what a fit says at its end."""

import sys
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import main
from sanm_lightning.commands.export import export
from sanm_lightning.data import Toy
from sanm_lightning.run.start_weights import start_from
from tests.methods.toy import method
from tests.test_cli import SMALL, TOY, Theirs, typed


class Renamed(Toy):
    """Data with named classes."""

    class_names = ["a", "b", "c", "other"]


NONE = [*TOY, "--trainer.limit_train_batches", "0"]  # nothing is trained: the model holds what was loaded


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of one network and of two, by method."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sanm"])
        patch.chdir(folder)
        for name in ("CrossEntropy", "ELRPlus"):
            cli = main(["fit", *SMALL, "--model", name, "--model.sanm", "SANM", *TOY, "--seed_everything", "5"])
            cli.trainer.save_checkpoint(f"{name}.ckpt")
    return folder


def held(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(network, state: dict[str, torch.Tensor], prefix: str, but: tuple[str, ...] = ()) -> bool:
    own = {name: part for name, part in network.state_dict().items() if name not in but}
    return all(torch.equal(part, state[prefix + name]) for name, part in own.items())


class TestWeights:
    def test_of_one_network_fill_both_networks_of_another_method(self, trained, caplog):
        with caplog.at_level("INFO", "lightning.pytorch"):
            cli = main(["fit", *SMALL, "--model", "CoTeaching", "--model.noise_rate", "0.2", *NONE,
                        "--weights", str(trained / "CrossEntropy.ckpt")])  # fmt: skip
        state = held(trained / "CrossEntropy.ckpt")
        assert same(cli.model.network, state, "network.")
        assert same(cli.model.network2, state, "network.")
        assert "CrossEntropy.ckpt loaded into both networks" in caplog.text
        assert "initialized randomly" not in caplog.text

    def test_of_two_networks_fill_each_its_own(self, trained):
        cli = main(["fit", *SMALL, "--model", "ELRPlus", *NONE, "--weights", str(trained / "ELRPlus.ckpt")])
        state = held(trained / "ELRPlus.ckpt")
        assert same(cli.model.network, state, "network.")
        assert same(cli.model.network2, state, "network2.")
        assert not torch.equal(state["network.network.fc.weight"], state["network2.network.fc.weight"])

    def test_start_a_run_of_other_length_and_rate_at_epoch_0(self, trained):
        other = ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.5", "--trainer.max_epochs", "2"]
        cycle = ["--model.scheduler", "OneCycle", "--model.scheduler.max_lr", "0.1"]
        cli = main(["fit", *SMALL, *TOY, *other, *cycle, "--weights", str(trained / "CrossEntropy.ckpt")])
        assert cli.trainer.global_step == 2 * 2
        assert cli.model.schedule_steps == 2 * 2

    def test_of_an_exported_folder_are_those_of_its_checkpoint(self, trained, tmp_path):
        for name, networks in (("ELRPlus", 2), ("CrossEntropy", 1)):
            export(str(trained / f"{name}.ckpt"), str(tmp_path / name))
            state = held(trained / f"{name}.ckpt")
            for given in (tmp_path / name, tmp_path / name / "network" / "model.safetensors"):
                cli = main(["fit", *SMALL, "--model", name, *NONE, "--weights", str(given)])
                assert same(cli.model.network, state, "network.")
                both = networks == 2 and given == tmp_path / name
                assert networks == 1 or same(cli.model.network2, state, "network2." if both else "network.")

    @pytest.mark.parametrize(
        ("words", "classes"), [(["--data.num_classes", "5"], 5), (["--data", f"{__name__}.Renamed"], 4)]
    )
    def test_for_other_classes_leave_the_classifier_and_name_it(self, trained, caplog, words, classes):
        at = NONE.index("Toy") + 1
        with caplog.at_level("INFO", "lightning.pytorch"):
            named = [*NONE[:at], *words, *NONE[at:]] if words[0] != "--data" else [*words, *NONE[at:]]
            checkpoint = trained / "CrossEntropy.ckpt"
            if classes == 4:  # of classes with names
                kept = torch.load(checkpoint, weights_only=True)
                checkpoint = Path("named.ckpt")
                torch.save({**kept, "class_names": ["a", "b", "c", "d"]}, checkpoint)
            cli = main(["fit", *SMALL, *named, "--weights", str(checkpoint)])
        head = ("network.fc.weight", "network.fc.bias")
        assert cli.model.num_classes == classes
        assert same(cli.model.network, held(checkpoint), "network.", but=head)
        assert "initialized randomly: network.network.fc.weight, network.network.fc.bias" in caplog.text
        own = cli.model.network.network.fc.weight
        assert own.shape[0] != 4 or not torch.equal(own, held(checkpoint)["network.network.fc.weight"])

    def test_that_are_missing_or_of_another_network_stop_the_run(self, trained, monkeypatch, capsys):
        for path, words, said in (
            (trained / "CrossEntropy.ckpt", ["--model.network_args", "{width: 8}"], "use the network and the width"),
            (
                trained / "CrossEntropy.ckpt",
                ["--model.network", "cnn9", "--model.network_args", "null"],
                "expected weights of Normalized",
            ),
            ("nowhere.ckpt", [], "'nowhere.ckpt', which does not exist; check the path"),
        ):
            with pytest.raises(SystemExit):
                typed(monkeypatch, "fit", *SMALL, *words, *TOY, "--weights", str(path))
            error = capsys.readouterr().err
            assert error.startswith("sanm: expected ")
            assert said in error

    def test_are_not_read_by_a_resumed_run_nor_by_an_evaluation(self, trained, monkeypatch, capsys):
        resumed = ["--ckpt_path", str(trained / "CrossEntropy.ckpt"), "--weights", "nowhere.ckpt"]
        cli = main(["fit", *SMALL, "--model.sanm", "SANM", *TOY, "--trainer.max_epochs", "2", *resumed])
        assert cli.trainer.global_step == 2 * 2
        with pytest.raises(SystemExit):
            typed(monkeypatch, "test", *SMALL, *TOY[:-2], "--weights", "some.ckpt")
        assert "expected --ckpt_path FILE for test, got --weights some.ckpt" in capsys.readouterr().err

    def test_normalized_in_another_way_are_warned_of(self, trained):
        with pytest.warns(UserWarning, match=r"set --model.mean to normalize the images as in the earlier run"):
            start_from(method(mean=(0.1, 0.2, 0.3)), trained / "CrossEntropy.ckpt")

    def test_of_a_foreign_module_are_all_required(self, tmp_path):
        source, target = Theirs(), Theirs()
        torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
        start_from(target, tmp_path / "a.ckpt")
        assert torch.equal(source.layer.weight, target.layer.weight)
        torch.save({"layer.weight": source.layer.weight}, tmp_path / "b.ckpt")
        with pytest.raises(
            ValueError, match=r"expected all 2 tensors of Theirs .* got 1 .*\(not in the file: layer.bias\)"
        ):
            start_from(target, tmp_path / "b.ckpt")


class TestEndOfAFit:
    def test_is_one_line_each(self, caplog):
        words = [*TOY, "--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "here"]
        words += ["--trainer.max_epochs", "2", "--data.val_fraction", "0.25"]
        with caplog.at_level("INFO", "lightning.pytorch"):
            cli = main(["fit", *SMALL, *words])
        said = caplog.messages[-1].splitlines()
        assert [line.partition(":")[0] for line in said] == [
            "accuracy, test set", "accuracy, split val", "weights", "results", "labels", "label issues", "next",
        ]  # fmt: skip
        record = next(part for part in cli.trainer.callbacks if hasattr(part, "val_accuracies"))
        for line, series in zip(said, (record.accuracies, record.val_accuracies), strict=False):
            assert line.endswith(f": {max(series.values()):.4f} best epoch, {series[1]:.4f} last epoch")
        named = [word.strip(",") for line in said[2:] for word in line.split() if word.startswith("here")]
        assert len(named) == 7
        assert all(Path(path).is_file() for path in named)
        assert said[-1] == "next: sanm predict --ckpt_path here/checkpoints/last.ckpt --images FOLDER"

    def test_leaves_out_what_there_is_not(self, caplog):
        with caplog.at_level("INFO", "lightning.pytorch"):
            main(["fit", "--model", "SimCLR", *SMALL[2:], *TOY, "--data.track_test", "false", "--audit", "false"])
        assert [line.partition(":")[0] for line in caplog.messages[-1].splitlines()] == ["results", "labels"]
