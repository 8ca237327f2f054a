"""The command line, as a user types it."""

import json
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from sanm_lightning import CrossEntropy
from sanm_lightning.cli import SANMCLI, entry_point, main
from sanm_lightning.command_line import config_paths
from sanm_lightning.data import Toy

TOY = [
    "--data", "Toy", "--data.num_samples", "24", "--data.num_test_samples", "16",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "1",
]  # fmt: skip
SMALL = ["--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


def typed(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sanm", *words])
    entry_point()


class TestFit:
    def test_class_number_and_image_size_flow_from_data_to_model(self):
        model = main(["fit", *SMALL, *TOY, "--data.num_classes", "5", "--data.image_size", "12"]).model
        assert (model.num_classes, model.image_size) == (5, (12, 12))

    def test_options_on_the_line_reach_sanm(self):
        model = main(["fit", *SMALL, "--model.sanm", "SANM", "--model.sanm.mu", "0.2", *TOY]).model
        assert model.sanm.enabled
        assert model.sanm.mu == 0.2

    def test_leaves_results_with_every_key(self):
        noise = ["--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.5"]
        sanm = ["--model.sanm", "SANM", "--model.warmup_epochs", "0"]
        main(["fit", *SMALL, *sanm, *TOY, *noise, "--seed_everything", "7", "--trainer.default_root_dir", "here"])
        with open("here/results.json") as file:
            results = json.load(file)
        assert list(results) == [
            "method", "sanm", "seed", "epochs", "seconds", "noise_kind", "noise_rate", "measured_noise_rate",
            "test_accuracy_best", "test_accuracy_last", "test_accuracy_last10", "val_accuracy_best", "val_accuracy_last",
            "selected_on", "quality_auc", "stages", "label_issues", "masked_steps", "timing",
        ]  # fmt: skip
        assert results["method"] == "CrossEntropy"
        assert results["sanm"] is True
        assert results["seed"] == 7
        assert results["epochs"] == 1
        assert results["noise_rate"] == results["measured_noise_rate"] == 0.5
        assert results["test_accuracy_best"] == results["test_accuracy_last"] == results["test_accuracy_last10"]
        assert 0 <= results["quality_auc"] <= 1

    def test_saves_the_labels_it_trained_on(self):
        import numpy

        noise = ["--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.25"]
        main(["fit", *SMALL, *TOY, *noise, "--trainer.default_root_dir", "here"])
        with numpy.load("here/labels.npz") as saved:
            assert (saved["labels"] != saved["true_labels"]).mean() == 0.25

    def test_a_callback_whose_default_is_an_enumeration_runs(self):
        timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "00:00:05:00"]
        cli = main(["fit", *SMALL, *TOY, *timer])
        assert cli.trainer.global_step == 2
        assert next(part for part in cli.trainer.callbacks if type(part).__name__ == "Timer").time_elapsed("train") > 0

    def test_what_is_unknown_is_null(self):
        main(["fit", *SMALL, *TOY, "--data.track_test", "false", "--trainer.default_root_dir", "here"])
        with open("here/results.json") as file:
            results = json.load(file)
        unknown = ("noise_rate", "test_accuracy_best", "test_accuracy_last", "test_accuracy_last10", "quality_auc")
        assert [results[key] for key in unknown] == [None] * 5

    def test_one_cycle_takes_its_length_from_the_trainer(self):
        cycle = ["--model.scheduler", "OneCycle", "--model.scheduler.max_lr", "0.1", "--trainer.max_epochs", "3"]
        run = main(["fit", *SMALL, *TOY, *cycle]).trainer
        (schedule,) = run.lr_scheduler_configs
        assert schedule.interval == "step"
        assert schedule.scheduler.total_steps == run.global_step == 3 * 2

    def test_a_checkpoint_of_the_line_loads_without_being_told_anything(self):
        cli = main(
            ["fit", *SMALL, "--model.sanm", "SANM", *TOY, "--model.optimizer", "Adam", "--model.optimizer.lr", "0.01"]
        )
        cli.trainer.save_checkpoint("run.ckpt")
        again = CrossEntropy.load_from_checkpoint("run.ckpt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), cli.model.parameters(), strict=True))
        assert again.sanm.enabled


class Measured(Toy):
    """Data that know their channel statistics."""

    mean = (0.1, 0.2, 0.3)
    std = torch.tensor([0.5, 0.25, 0.125])


class Shifted(Toy):
    mean, std = (0.75, 0.75, 0.75), (0.5, 0.5, 0.5)


class Odd(Toy):
    """Data with something else by these names."""

    def mean(self) -> float:
        return 0.0

    std = 0.5


class Theirs(L.LightningModule):
    """A module with arguments of these names, and no network to normalize for."""

    def __init__(
        self, mean: float | None = None, std: float | None = None, num_classes: int = 4, image_size: object = None
    ):
        super().__init__()
        self.said = mean, std
        self.layer = torch.nn.Linear(3, num_classes)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0].mean((2, 3))).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def statistics(cli) -> tuple[list[float], list[float]]:
    """What the network normalizes with, which is what the hyper-parameters hold."""
    mean, std = cli.model.network.mean.flatten().tolist(), cli.model.network.std.flatten().tolist()
    if cli.model.hparams.mean is not None:
        torch.testing.assert_close(torch.tensor(cli.model.hparams.mean), torch.tensor(mean))
    if cli.model.hparams.std is not None:
        torch.testing.assert_close(torch.tensor(cli.model.hparams.std), torch.tensor(std))
    return [round(value, 6) for value in mean], [round(value, 6) for value in std]


class TestStatisticsOfTheData:
    MEASURED = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]

    def fit(self, *words: str, data: str = "Measured", command: str = "fit"):
        toy = [word for word in TOY if command == "fit" or word not in ("--trainer.max_epochs", "1")]
        return main([command, *SMALL, *toy, "--data", f"{__name__}.{data}", *words])

    def test_fill_in_what_is_null(self):
        cli = self.fit()
        assert statistics(cli) == self.MEASURED
        assert cli.model.hparams.mean is not None and cli.model.hparams.std is not None

    def test_reach_both_networks(self):
        cli = self.fit("--model", "ELRPlus")
        assert statistics(cli) == self.MEASURED
        torch.testing.assert_close(cli.model.network2.mean.flatten(), torch.tensor(Measured.mean))

    def test_leave_what_was_given(self):
        assert statistics(self.fit("--model.std", "[1, 1, 1]")) == (self.MEASURED[0], [1, 1, 1])

    def test_leave_what_the_methods_config_says(self):
        Path("method.yaml").write_text("model: {class_path: ELR, init_args: {mean: [0, 0, 0], std: [1, 1, 1]}}")
        assert statistics(self.fit("--config", "method.yaml")) == ([0, 0, 0], [1, 1, 1])

    def test_leave_a_pretrained_network_its_own(self, monkeypatch):
        """Nothing is handed to a network that brings its statistics along."""
        from sanm_lightning.methods import base

        asked = []

        def create(name, num_classes, mean=None, std=None, pretrained=False, **options):
            asked.append((mean, std, pretrained))
            return made(name, num_classes, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), **options)

        made = base.create_network
        monkeypatch.setattr(base, "create_network", create)
        cli = self.fit("--model.network_args", "{width: 4, pretrained: true}")
        assert asked == [(None, None, True)]
        assert statistics(cli) == ([0.4] * 3, [0.2] * 3)

    @pytest.mark.parametrize("data", ["Odd", "Toy"])
    def test_data_without_them_leave_the_defaults(self, data):
        assert statistics(self.fit(data=data)) == ([0.5] * 3, [0.25] * 3)

    def test_a_module_without_a_network_is_left_alone(self):
        words = [word for word in TOY if word != "Toy"]
        words.insert(1, f"{__name__}.Measured")
        assert main(["fit", "--model", f"{__name__}.Theirs", *words]).model.said == (None, None)

    def test_a_checkpoint_holds_them(self):
        self.fit().trainer.save_checkpoint("run.ckpt")
        again = CrossEntropy.load_from_checkpoint("run.ckpt", weights_only=True)
        torch.testing.assert_close(again.network.mean.flatten(), torch.tensor(Measured.mean))

    def test_a_resumed_run_goes_on_with_them_and_refuses_others(self):
        self.fit().trainer.save_checkpoint("run.ckpt")
        words = ["--ckpt_path", "run.ckpt", "--trainer.max_epochs", "2"]
        assert statistics(self.fit(*words)) == self.MEASURED
        with pytest.raises(ValueError, match=r"model.mean \[0.5, 0.5, 0.5\] \(the checkpoint: \[0.1, 0.2, 0.3\]\)"):
            self.fit(*words, "--model.mean", "[0.5, 0.5, 0.5]")

    def test_a_trained_model_is_tested_on_other_data_with_its_own(self):
        saving = ["--trainer.default_root_dir", "here", "--trainer.enable_checkpointing", "true"]
        self.fit(*saving)
        for checkpoint in ("last", str(next(Path("here").rglob("*.ckpt")))):
            cli = self.fit(*saving, "--ckpt_path", checkpoint, data="Shifted", command="test")
            assert cli.model.network.mean.flatten().tolist() == pytest.approx(self.MEASURED[0])


class TestOtherCommands:
    @pytest.mark.parametrize(
        ("first", "made"), [("test", ["test"]), ("--config", ["fit", "validate", "test", "predict"])]
    )
    def test_a_leading_subcommand_has_the_only_parser(self, first, made):
        class ParserOnly(SANMCLI):
            def parse_arguments(self, parser, args):
                raise ValueError(list(self._subcommand_parsers))

        with pytest.raises(ValueError, match=re.escape(str(made))):
            ParserOnly(CrossEntropy, Toy, subclass_mode_model=True, subclass_mode_data=True, args=[first])

    def test_validate_test_and_predict_run(self):
        cli = main(["fit", *SMALL, *TOY])
        cli.trainer.save_checkpoint("run.ckpt")
        trained = ["--ckpt_path", "run.ckpt"]
        toy = [word for word in TOY if word not in ("--trainer.max_epochs", "1")]
        for command in ("validate", "test", "predict"):
            main([command, *SMALL, *toy, *trained])

    def test_predict_answers_index_and_probabilities_of_every_sample(self):
        cli = main(["fit", *SMALL, *TOY])
        batches = cli.trainer.predict(cli.model, cli.datamodule)
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(16))
        torch.testing.assert_close(torch.cat([batch["probabilities"] for batch in batches]).sum(1), torch.ones(16))

    def test_a_printed_config_comes_back_the_same(self, capsys):
        with pytest.raises(SystemExit):
            main(["fit", *SMALL, "--model.sanm", "SANM", *TOY, "--print_config"])
        first = capsys.readouterr().out
        with open("printed.yaml", "w") as file:
            file.write(first)
        with pytest.raises(SystemExit):
            main(["fit", "--config", "printed.yaml", "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(first)


def test_a_users_own_module_and_data_in_the_working_directory_can_be_named(tmp_path):
    (tmp_path / "my_own.py").write_text(
        "import lightning as L, torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "from sanm_lightning import SANMMixin\n"
        "class Mine(SANMMixin, L.LightningModule):\n"
        "    def __init__(self, width: int = 4, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.conv = torch.nn.Conv2d(3, width, 3)\n"
        "        self.pool = torch.nn.AdaptiveAvgPool2d(1)\n"
        "        self.fc = torch.nn.Linear(width, 3)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.pool(self.conv(x)).flatten(1))\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        x, y = batch\n"
        "        return torch.nn.functional.cross_entropy(self(x), y)\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "class Data(L.LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader(TensorDataset(torch.rand(8, 3, 9, 9), torch.arange(8) % 3), 4)\n"
    )
    quiet = [word for word in TOY if not word.startswith(("--data", "Toy", "24", "16"))]
    model = main(["fit", "--model", "my_own.Mine", "--model.width", "5", "--data", "my_own.Data", *quiet]).model
    assert model.sanm.decoder is not None


class TestWrongInput:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([*SMALL, *TOY, "--model.sanm", "SANM", "--model.sanm.mu", "1.5"], "expected mu in [0, 1], got 1.5"),
            ([*SMALL, *TOY, "--data.noise.kind", "symmetric", "--data.noise.rate", "1.5"], "1.5"),
            ([*SMALL, "--data", "ImageFolder", "--data.root", "nowhere"], "nowhere"),
            ([*SMALL, *TOY, "--data.max_train_samples", "25"], "expected max_train_samples from 4"),
            (["--config", "no_such_file.yaml"], "no_such_file.yaml"),
            ([*SMALL, *TOY, "--model.mu", "1"], "mu"),
            (["--model", "NoSuchMethod", *TOY], "NoSuchMethod"),
        ],
        ids=["mu", "noise rate", "root", "too many samples", "config", "unknown option", "unknown method"],
    )
    def test_ends_with_a_sentence_and_status_2(self, monkeypatch, capsys, words, message):
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", *words)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said


class TestConfigs:
    """The sentences about configs. ``configs/`` does not lie in the directory of a test: those of the package are meant."""

    METHOD, DATA = "configs/method/cross_entropy.yaml", "configs/data/cifar10.yaml"
    NOISE, SETTING = "configs/noise/sym50.yaml", "configs/setting/cross_entropy/cifar100.yaml"

    @pytest.mark.parametrize(
        ("words", "got", "folder"),
        [
            (["--config", METHOD, "--config", NOISE, "--config", DATA], NOISE, "configs/data/"),
            (["--config", NOISE], NOISE, "configs/data/"),
            (["--config", DATA, "--config", SETTING, "--config", METHOD], SETTING, "configs/method/"),
            (["--config", METHOD, "--data.noise.kind", "symmetric", "--config", DATA], "--data.noise.kind", "configs/data/"),
            (["--config", DATA, "--model.warmup_epochs=3", "--model", "ELR"], "--model.warmup_epochs", "configs/method/"),
        ],
        ids=["noise before data", "no data", "setting before method", "option before data", "option before model"],
    )  # fmt: skip
    def test_options_before_their_class_are_refused_with_the_order(self, monkeypatch, capsys, words, got, folder):
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", *words)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert re.search(
            rf"expected the class of the \w+ before its options, got the \w+ '?\S*{re.escape(got)}'? first", said
        )
        assert f"add a config from {folder}" in said
        assert "the order is method, data, setting, noise, sanm" in said

    @pytest.mark.parametrize(
        "words",
        [
            ["fit", "--config", METHOD, "--config", DATA, "--config", NOISE],
            ["fit", "--model", "ELR", "--model.momentum", "0.5", "--data=CIFAR10", "--config", NOISE],
            ["fit", "--model.class_path", "ELR", "--config", SETTING, "--config", DATA],
            ["fit", "--model.help", "ELR"],
            ["--config", "whole.yaml", "fit", "--model.momentum", "0.5", "--config", NOISE],
            ["fit", "--config", "{model: {class_path: ELR}}", "--model.momentum", "0.5"],
            ["fit", "--config", "broken.yaml"],
        ],
        ids=["configs", "options", "class path", "help", "before the command", "text", "not YAML"],
    )
    def test_any_other_order_is_left_to_the_parser(self, words):
        Path("whole.yaml").write_text("fit: {model: {class_path: ELR}, data: {class_path: CIFAR10}}")
        Path("broken.yaml").write_text("model: [")
        config_paths.check_order(config_paths.resolve(words))

    @pytest.mark.parametrize("option", ["--config", "--trainer"])
    def test_a_repeated_key_in_a_config_is_refused(self, monkeypatch, capsys, option):
        Path("twice.yaml").write_text("max_epochs: 1\nmax_steps: 5\nmax_epochs: 2\n")
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", "--config", "configs/quickstart.yaml", option, "twice.yaml")
        assert end.value.code == 2
        sentence = (
            "expected each key of a mapping once in 'twice.yaml', got 'max_epochs' in lines 1 and 3; remove one of them"
        )
        assert sentence in capsys.readouterr().err

    def test_a_config_with_an_alias_and_a_merged_mapping_is_read(self):
        Path("alias.yaml").write_text("a: &one {x: 1}\nb: *one\nc: {<<: *one, x: 2}\n")
        config_paths.check_keys(["fit", "--config", "alias.yaml"])

    def test_a_config_that_does_not_exist_is_told_with_the_nearest_names(self, monkeypatch, capsys):
        for name, near in (
            ("configs/method/dividemx.yaml", "near: configs/method/dividemix.yaml"),
            ("configs/dividemix.yaml", "near: configs/method/dividemix.yaml"),
            ("configs/cifar10/no_such_method.yaml", "choose one from "),
        ):
            with pytest.raises(SystemExit):
                typed(monkeypatch, "fit", "--config", name)
            said = capsys.readouterr().err
            assert f"expected an existing config, got {name!r}; {near}" in said
            assert said.count("\n") == 2

    def test_an_old_path_is_told_with_the_new_ones(self, monkeypatch, capsys):
        with pytest.raises(SystemExit) as end:
            typed(monkeypatch, "fit", "--config=configs/cifar10/elr.yaml")
        assert end.value.code == 2
        assert (
            "use --config configs/method/elr.yaml --config configs/data/cifar10.yaml --config "
            in capsys.readouterr().err
        )

    @pytest.mark.parametrize(
        ("configs", "unused"),
        [
            (["method/dividemix", "data/cifar100"], "dividemix/cifar100"),
            (["method/dividemix", "data/cifar100", "noise/sym80"], "dividemix/cifar100"),
            (["method/dividemix", "data/cifar100", "noise/sym20"], "dividemix/cifar100-sym20"),
            (["method/dividemix", "data/cifar100", "setting/dividemix/cifar100", "noise/sym20"], "dividemix/cifar100-sym20"),
            (["method/dividemix", "data/cifar100", "setting/dividemix/cifar100-sym20", "noise/sym20"], None),
            (["method/dividemix", "data/cifar100", "setting/dividemix/cifar100", "noise/sym80"], None),
            (["method/dividemix", "data/cifar10", "noise/sym50"], None),
            (["method/cross_entropy", "data/cifar10", "setting/cross_entropy/cifar10-small", "noise/sym50"], None),
            (["method/dividemix", "noise/sym20"], None),
            (["quickstart"], None),
        ],
    )  # fmt: skip
    def test_a_published_setting_that_is_not_used_is_named(self, configs, unused):
        words = config_paths.resolve(["fit", *(f"--config=configs/{config}.yaml" for config in configs)])
        assert config_paths.unused_setting(words) == (unused and f"configs/setting/{unused}.yaml")

    def test_the_command_line_tells_it(self, caplog):
        small = ["--model.network", "small_cnn", "--model.network_args", "{width: 4}"]
        configs = ["--config", self.METHOD, "--config", "configs/data/cifar100.yaml"]
        with caplog.at_level("INFO", "lightning.pytorch"):
            main(["fit", *configs, *small, *TOY])
        assert "configs/setting/cross_entropy/cifar100.yaml has published values" in caplog.text
