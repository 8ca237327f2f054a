"""Every recipe runs a step, alone and under what is laid on top of it."""

import sys
from pathlib import Path

import pytest

from sanm_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted([CONFIGS / "quickstart.yaml", CONFIGS / "image_folder.yaml", *CONFIGS.glob("cifar*/*.yaml")])
NOISE = sorted(CONFIGS.glob("noise/*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def one_step(monkeypatch, *configs: Path, classes: int = 10):
    monkeypatch.setattr(sys, "argv", ["sanm"])
    words = [word for config in configs for word in ("--config", str(config))]
    toy = {
        "num_classes": classes,
        "image_size": 32,
        "num_samples": max(24, classes),
        "num_test_samples": 8,
        "batch_size": 8,
    }
    words += ["--data", "Toy", *(word for key, value in toy.items() for word in (f"--data.{key}", str(value)))]
    words += ["--data.max_train_samples", "null", "--data.crop_padding", "2"]
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    words += [f"--trainer.{key}=false" for key in quiet]
    words += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    words += ["--trainer.limit_val_batches=0", "--model.warmup_epochs=0"]
    if "image_folder" in str(configs[0]):  # the map of a network for large images has one place on these
        words += ["--model.network", "small_cnn"]
    return main(["fit", *words])


def slim(monkeypatch):
    """Shrink what the recipes ask for, so that a step takes no second: the recipe is the test, not the arithmetic."""
    from sanm_lightning.models import preact_resnet

    plain = preact_resnet.PreActResNet.__init__
    monkeypatch.setattr(
        preact_resnet.PreActResNet, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "width": 4})
    )


@pytest.mark.parametrize("config", METHODS, ids=name)
def test_a_method_runs_a_step(monkeypatch, config):
    slim(monkeypatch)
    cli = one_step(monkeypatch, config, classes=100 if "cifar100" in str(config) else 10)
    assert cli.trainer.global_step == 1
    assert not cli.model.sanm.enabled
    assert cli.datamodule.noise_kind == ("symmetric_exclusive" if config.stem == "quickstart" else "none")


@pytest.mark.parametrize("config", METHODS, ids=name)
def test_a_method_runs_a_step_under_sanm(monkeypatch, config):
    slim(monkeypatch)
    cli = one_step(monkeypatch, config, CONFIGS / "sanm.yaml", classes=100 if "cifar100" in str(config) else 10)
    assert cli.model.sanm.enabled
    assert cli.model.sanm.last["hidden_share"].ndim == 0


@pytest.mark.parametrize("noise", NOISE, ids=name)
def test_noise_goes_on_top_of_a_method(monkeypatch, noise):
    slim(monkeypatch)
    cli = one_step(monkeypatch, CONFIGS / "cifar10" / "cross_entropy.yaml", noise, CONFIGS / "sanm.yaml")
    kind = {"sym": "symmetric", "asym": "asymmetric"}[noise.stem.split("_")[0].rstrip("0123456789")]
    assert cli.datamodule.noise_kind == kind + ("_exclusive" if noise.stem.endswith("exclusive") else "")
    assert cli.datamodule.noise_rate == int("".join(c for c in noise.stem if c.isdigit())) / 100


def test_the_quickstart_runs_a_step_under_its_own_sanm(monkeypatch):
    cli = one_step(monkeypatch, CONFIGS / "quickstart.yaml", CONFIGS / "quickstart_sanm.yaml")
    assert cli.model.sanm.last["hidden_share"].ndim == 0
