"""Every recipe runs a step, alone and under what is laid on top of it."""

import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from sanm_lightning.cli import main
from sanm_lightning.models import create_network

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted([CONFIGS / "quickstart.yaml", CONFIGS / "image_folder.yaml", *CONFIGS.glob("cifar*/*.yaml")])
NOISE = sorted(CONFIGS.glob("noise/*.yaml"))
OVERLAYS = sorted(CONFIGS.glob("cifar*/*/*.yaml"))
SANMS = sorted(CONFIGS.glob("sanm/*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def encoder(config: Path) -> str:
    """Random weights in a file, as if they were pre-trained."""
    network = create_network("preact_resnet18", 10, width=4)
    with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
        torch.save(network.state_dict(), file.name)
    FILES.append(Path(file.name))
    return file.name


FILES: list[Path] = []


@pytest.fixture(autouse=True)
def clean_up():
    """Take away what :func:`encoder` left; an empty labelled set on 24 samples is no fault."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*empty.*")
        yield
    while FILES:
        FILES.pop().unlink()


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
    if "simclr" in str(configs[0]):  # it evaluates nothing
        words += ["--data.track_test", "false"]
    if "ssr" in str(configs[0]):
        words += ["--model.k", "5"]
    if "c2d" in str(configs[0]):
        words += ["--model.pretrained", encoder(configs[0])]
    if "frozen" in str(configs[-1]):  # its weights would be downloaded
        words += ["--model.sanm.place.name", "resnet18", "--model.sanm.place.pretrained", "false"]
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


@pytest.mark.parametrize("config", [config for config in METHODS if config.stem != "simclr"], ids=name)
def test_a_method_runs_a_step_under_sanm(monkeypatch, config):
    slim(monkeypatch)
    cli = one_step(monkeypatch, config, CONFIGS / "sanm.yaml", classes=100 if "cifar100" in str(config) else 10)
    assert cli.model.sanm.enabled
    assert cli.model.sanm.last["masked_fraction"].ndim == 0


def test_simclr_under_sanm_is_refused_in_a_sentence(monkeypatch):
    slim(monkeypatch)
    with pytest.raises(ValueError, match="SimCLR reads no labels"):
        one_step(monkeypatch, CONFIGS / "cifar10" / "simclr.yaml", CONFIGS / "sanm.yaml")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_a_rates_overlay_fits_its_method_and_noise(monkeypatch, overlay):
    slim(monkeypatch)
    method = overlay.parent.with_suffix(".yaml")
    noise = CONFIGS / "noise" / overlay.name
    assert noise.exists()
    cli = one_step(monkeypatch, method, noise, overlay, classes=100 if "cifar100" in str(overlay) else 10)
    for option in ("forget_rate", "noise_rate"):
        if hasattr(cli.model, option):
            assert getattr(cli.model, option) == cli.datamodule.noise_rate


@pytest.mark.parametrize("overlay", SANMS, ids=name)
def test_a_variant_of_sanm_goes_on_top_of_a_method(monkeypatch, overlay):
    slim(monkeypatch)
    cli = one_step(monkeypatch, CONFIGS / "cifar10" / "cross_entropy.yaml", CONFIGS / "noise" / "sym50.yaml", overlay)
    assert cli.model.sanm.last["masked_fraction"].ndim == 0


@pytest.mark.parametrize("method", ["dividemix", "c2d"])
@pytest.mark.parametrize("views", [("sanm/released", "views/released"), ("views/control",)], ids=" ".join)
def test_the_released_views_and_their_control(monkeypatch, method, views):
    slim(monkeypatch)
    overlays = [CONFIGS / f"{view}.yaml" for view in views]
    cli = one_step(monkeypatch, CONFIGS / "cifar10" / f"{method}.yaml", CONFIGS / "noise" / "sym50.yaml", *overlays)
    assert cli.model.sanm.enabled == (len(views) == 2)


@pytest.mark.parametrize("noise", NOISE, ids=name)
def test_noise_goes_on_top_of_a_method(monkeypatch, noise):
    slim(monkeypatch)
    cli = one_step(monkeypatch, CONFIGS / "cifar10" / "cross_entropy.yaml", noise, CONFIGS / "sanm.yaml")
    kind = {"sym": "symmetric", "asym": "asymmetric"}[noise.stem.split("_")[0].rstrip("0123456789")]
    assert cli.datamodule.noise_kind == kind + ("_exclusive" if noise.stem.endswith("exclusive") else "")
    assert cli.datamodule.noise_rate == int("".join(c for c in noise.stem if c.isdigit())) / 100


def test_the_quickstart_runs_a_step_under_its_own_sanm(monkeypatch):
    cli = one_step(monkeypatch, CONFIGS / "quickstart.yaml", CONFIGS / "quickstart_sanm.yaml")
    assert cli.model.sanm.last["masked_fraction"].ndim == 0
