"""The cost of a cell in forward passes, measured with a small network on synthetic images."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.cost import PassCounter
from sanm_lightning.models import create_network
from sanm_lightning.study.cells import Cell, settings_of

__all__ = ["forward_passes", "images_per_epoch", "passes_per_image"]

IMAGES = 256
"""Training images of a measurement, of 32 x 32 pixels and 10 classes; half of their labels are resampled."""
EPOCHS = 3
"""Epochs of a measurement, of which one is a warm-up; the last is counted."""
SIZES = {"cifar10": 50_000, "cifar100": 50_000, "cifar10n": 50_000, "cifar100n": 50_000, "animal10n": 50_000,
         "clothing1m": 32_000, "digits": 1_297}  # fmt: skip
"""Training images per epoch by data; of Clothing1M, those of the subset that is drawn for each epoch."""
COUNTER = "sanm_lightning.cost.PassCounter"
TOY = {
    "data.num_samples": IMAGES, "data.num_classes": 10, "data.image_size": 32, "data.num_test_samples": 8,
    "data.batch_size": 32, "data.max_train_samples": "null", "data.val_fraction": 0.0, "data.drop_last": "false",
    "data.noise.kind": "symmetric", "data.noise.rate": 0.5, "data.seed": 1, "data.num_workers": 0,
    "data.track_test": "false", "model.warmup_epochs": 1, "model.network": "small_cnn", "model.network_args": "{width: 4}",
    "trainer.max_epochs": EPOCHS, "trainer.accelerator": "cpu", "trainer.logger": "false", "trainer.limit_val_batches": 0,
    "trainer.enable_checkpointing": "false", "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
    "trainer.num_sanity_val_steps": 0, "audit": "false", "seed_everything": 1,
}  # fmt: skip


def forward_passes(cells: Sequence[Cell], console: Console | None = None) -> dict[str, float | None]:
    """Return the cost of each cell: the number of forward passes of one image during training.

    It is epochs x images per epoch x passes per image in an epoch after the warm-up (see :func:`passes_per_image`), which
    is measured once for all cells with the same method, setting, SANM and overlay. Backward passes are not counted.

    Args:
        cells: the cells.
        console: where the measurements are announced; None is silent.

    Returns:
        Forward passes by folder; None where the number of images or of epochs is unknown, or the measurement failed.
    """
    found: dict[tuple[Any, ...], float | None] = {}
    costs: dict[str, float | None] = {}
    for cell in cells:
        configs = [config for config in cell.configs if Path(config).parent.name not in ("data", "noise")]
        given = "model.noise_rate" in cell.options, cell.after is not None, "model.probe" in cell.options
        key = (*configs, *given)
        if key not in found:
            if console is not None and console.is_terminal:
                console.print(f"measuring {cell.method} {cell.sanm} ...", end="\r")
            found[key] = passes_per_image(configs, *given)
        images, passes = images_per_epoch(cell), found[key]
        if images is None or passes is None or cell.epochs is None:
            costs[cell.folder] = None
        else:
            costs[cell.folder] = cell.epochs * images * passes
    return costs


def images_per_epoch(cell: Cell) -> int | None:
    """Return the number of training images per epoch of a cell; None if it is unknown."""
    settings = {**settings_of(cell.configs), **cell.options}
    drawn = settings.get("data.samples_per_epoch", SIZES.get(cell.data))  # null is the whole set
    size = settings.get("data.max_train_samples") or drawn
    return None if size is None else round(size * (1 - (settings.get("data.val_fraction") or 0)))


def passes_per_image(
    configs: Sequence[str], noise_rate: bool = False, pretrained: bool = False, probe: bool = False
) -> float | None:
    """Measure the forward passes per training image in an epoch after the warm-up.

    A network of four layers is trained for a few epochs on synthetic images, half of whose labels are resampled. Which networks
    are counted is documented in :class:`~sanm_lightning.cost.PassCounter`.

    Args:
        configs: configs of method, setting, SANM and overlay; their options of the data are not used.
        noise_rate: whether the method is given the noise rate.
        pretrained: whether the method is given a pre-trained network.
        probe: whether the method is given known labels.

    Returns:
        The number; None if the method cannot be trained in this way.
    """
    from sanm_lightning.cli import main

    options: dict[str, Any] = {**TOY, **({"model.noise_rate": 0.5} if noise_rate else {})}
    if any(Path(config).stem == "frozen" for config in configs):
        options |= {"model.sanm.place.name": "resnet18", "model.sanm.place.pretrained": "false"}  # no download
    with tempfile.TemporaryDirectory() as folder, _alone():
        if pretrained:
            options["model.pretrained"] = f"{folder}/network.pt"
            torch.save(create_network("small_cnn", 10, width=4).state_dict(), options["model.pretrained"])
        if probe:
            options["model.probe"] = f"{folder}/probe.csv"
            Path(options["model.probe"]).write_text("index,label\n" + "".join(f"{i},{i % 10}\n" for i in range(20)))
        words = [f"--config={path}" for path in _without_data(configs, Path(folder))]
        words += [f"--{name}={value}" for name, value in options.items()]
        try:
            run = main(
                ["fit", "--data=Toy", *words, f"--trainer.default_root_dir={folder}", f"--trainer.callbacks+={COUNTER}"]
            )
        except (Exception, SystemExit):  # a method that requires more than these options: its cost is unknown
            return None
    trainer: Any = run.trainer
    counter = next(part for part in trainer.callbacks if isinstance(part, PassCounter))
    return counter.epochs[-1].forward + counter.epochs[-1].between_steps


def _without_data(configs: Sequence[str], folder: Path) -> Iterator[Path]:
    """Write copies of configs without their options of the data, and yield their paths."""
    for number, config in enumerate(configs):
        path = Path(config) if Path(config).is_file() else packaged() / config
        content = {name: part for name, part in yaml.safe_load(path.read_text()).items() if name != "data"}
        copy = folder / f"{number}.yaml"
        copy.write_text(yaml.safe_dump(content))
        yield copy


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Discard what a fit prints, and restore what it changes in this process: seed, arguments, search path."""
    level, arguments, path, state = logging.root.manager.disable, sys.argv[:], sys.path[:], torch.get_rng_state()
    seed = os.environ.get("PL_GLOBAL_SEED")
    logging.disable(logging.WARNING)
    sys.argv[1:] = []
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.argv[:], sys.path[:] = arguments, path
        torch.set_rng_state(state)
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed
