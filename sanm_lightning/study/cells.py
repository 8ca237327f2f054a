"""The cells of a study: one ``sanm fit`` each, with its folder, its command, and its differences from the published one."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sanm_lightning.command_line.config_paths import packaged, setting_for
from sanm_lightning.command_line.parsing import near_names
from sanm_lightning.study.schema import Grid, Study

__all__ = ["Cell", "cells_of", "settings_of"]

MACHINE = ("trainer.enable_", "trainer.accelerator", "trainer.num_sanity", "trainer.log_every", "data.num_workers",
           "data.root", "audit")  # fmt: skip
"""Beginnings of the names of options without influence on the accuracy; the batch size is that of each device."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        method: name of the method.
        sanm: ``base``, ``sanm`` or the name of a config of ``configs/sanm``.
        data: name of the data.
        noise: name of the noise, or ``none``.
        overlay: name of the overlay, or ``none``.
        name: name of the grid.
        seed: seed of the run.
        configs: paths of the configs, in their order on the command line.
        options: options by name, after the configs.
        after: folder of the run whose checkpoint is given as ``--model.pretrained``; None if there is none.
        epochs: number of epochs; None if the configs do not give it.
        differences: differences from the published run, as phrases.
        digest: hash of all settings of configs and options, except those without influence on the result.
        listed: whether the study lists the run, which otherwise only provides a pre-trained network.
    """

    method: str
    sanm: str
    data: str
    noise: str
    overlay: str
    name: str
    seed: int
    configs: tuple[str, ...]
    options: dict[str, Any]
    after: str | None
    epochs: int | None
    differences: tuple[str, ...]
    digest: str
    listed: bool = False

    @property
    def row(self) -> tuple[str, ...]:
        """What the seeds of a cell have in common: method, SANM, data, noise, overlay, name of the grid."""
        return self.method, self.sanm, self.data, self.noise, self.overlay, self.name

    @property
    def folder(self) -> str:
        """Folder in that of the study."""
        parts = [self.method, self.sanm, self.data, self.noise]
        parts += [part for part in (self.overlay.replace("/", "_"), self.name) if part not in ("none", "")]
        return "/".join([*parts, f"seed{self.seed}"])

    def command(self, root: Path) -> list[str]:
        """Return the arguments of ``sanm``.

        Args:
            root: folder of the study.
        """
        run = root / self.folder
        logger = {
            "class_path": "CSVLogger",
            "init_args": {"save_dir": str(run.parent), "name": "", "version": run.name},
        }
        words = ["fit", *(word for config in self.configs for word in ("--config", config))]
        for name, value in self.options.items():
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        if self.after:
            words += ["--model.pretrained", str(root / self.after / "checkpoints" / "last.ckpt")]
        words += ["--seed_everything", str(self.seed), "--trainer.default_root_dir", str(run)]
        words += ["--trainer.logger", json.dumps(logger), "--trainer.enable_progress_bar", "false"]
        return words

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Cell":
        """Return the cell of a JSON object that was made with ``dataclasses.asdict``."""
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("configs", "differences")}
        return cls(**{**content, **lists})


def cells_of(study: Study, data_root: str | None = None) -> list[Cell]:
    """Return the cells of a study, each after the run that it starts from.

    Args:
        study: the study.
        data_root: value of ``--data.root`` of all cells; None for that of the configs.

    Raises:
        ValueError: if a name is unknown, two cells have the same folder, or a noise rate is required but unknown.
    """
    root = {"data.root": data_root} if data_root else {}
    found: dict[str, Cell] = {}
    for grid in study.grids:
        for cell in _product(replace(grid, options={**grid.options, **root})):
            known = found.setdefault(cell.folder, cell)
            if known.digest != cell.digest or (known is not cell and known.listed and cell.listed):
                raise ValueError(
                    f"expected one cell per folder, got two for {cell.folder!r}; remove one, or give its grid a name"
                )
            found[cell.folder] = replace(known, listed=known.listed or cell.listed)
    return list(found.values())


def _product(grid: Grid) -> Iterator[Cell]:
    """Yield the cells of a grid, each after the run that it starts from."""
    axes = (grid.methods, grid.data, grid.noise, grid.sanm, grid.overlays, grid.seeds)
    before = replace(grid, pretraining={}, known_rate=())
    for method, data, noise, sanm, overlay, seed in itertools.product(*axes):
        if method in grid.pretraining:
            yield _cell(before, grid.pretraining[method], data, "none", "base", "none", grid.seeds[0])
        yield replace(_cell(grid, method, data, noise, sanm, overlay, seed), listed=True)


def _cell(grid: Grid, method: str, data: str, noise: str, sanm: str, overlay: str, seed: int) -> Cell:
    configs = [_find("method", method), _find("data", data)]
    setting = setting_for(method, data, None if noise == "none" else noise)
    configs += [setting] if setting else []
    configs += [_find("noise", noise)] if noise != "none" else []
    configs += [] if sanm == "base" else ["configs/sanm.yaml"] if sanm == "sanm" else [_find("sanm", sanm)]
    recipe = settings_of(configs)
    configs += [_find("", overlay)] if overlay != "none" else []
    options = {**grid.options, **grid.method_options.get(method, {})}
    rate = None if "data.noise" in options else {**settings_of(configs), **options}.get("data.noise.rate")
    if method in grid.known_rate:
        if rate is None:
            raise ValueError(
                f"expected noise with a rate for the method {method!r} of known_rate, got noise {noise!r}; remove the method "
                "from known_rate, and set its model.noise_rate in method_options"
            )
        options = {"model.noise_rate": rate, **options}
    after = None
    if method in grid.pretraining:
        parts = [grid.pretraining[method], "base", data, "none", *([grid.name] if grid.name else [])]
        after = "/".join([*map(_name, parts), f"seed{grid.seeds[0]}"])
    measured = {
        name: value for name, value in {**settings_of(configs), **options}.items() if not name.startswith(MACHINE)
    }
    epochs = measured.get("trainer.max_epochs")
    return Cell(
        method=_name(method), sanm=_name(sanm), data=_name(data), noise=_name(noise), overlay=_name(overlay), name=grid.name,
        seed=seed, configs=tuple(configs), options=options, after=after, epochs=epochs if isinstance(epochs, int) else None,
        differences=(*_own(configs, overlay), *_differences(recipe, options, overlay, rate)), digest=_digest([measured, after]),
    )  # fmt: skip


def _name(value: str) -> str:
    """Return the name of a config, or the stem of the path of a user's own."""
    return Path(value).stem if value.endswith((".yaml", ".yml")) else value


def _find(kind: str, name: str) -> str:
    """Return the path of a config, as it is written on a command line.

    Raises:
        ValueError: if there is no such config.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"expected an existing config, got {name!r}; check the path")
        return name
    folder = Path("configs", kind)
    path = folder / f"{name}.yaml"
    inside = ".." not in path.parts and path.is_relative_to(folder)
    if inside and (path.is_file() or (packaged() / path).is_file()):
        return str(path)
    known = sorted(
        str(other.relative_to(place / folder).with_suffix(""))
        for place in (packaged(), Path())
        for other in (place / folder).rglob("*.yaml")
    )
    near = near_names(name, known)
    what = f"{kind} of a study to be one of {folder}" if kind else f"overlay of a study to be one of {folder}"
    raise ValueError(f"expected {what}, got {name!r}; " + (f"near: {', '.join(near)}" if near else f"see {folder}"))


def settings_of(configs: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of several configs, later ones over earlier ones, by their names on the command line.

    Args:
        configs: paths of existing configs, or paths in ``configs/`` of the package.

    Returns:
        Values by names such as ``trainer.max_epochs`` and ``model.optimizer.lr``; ``model`` is the class.
    """
    found: dict[str, Any] = {}
    for config in configs:
        path = Path(config)
        found.update(_parsed((path if path.is_file() else packaged() / path).read_text()))
    return found


@functools.cache
def _parsed(text: str) -> dict[str, Any]:
    return _flat(yaml.safe_load(text) or {})


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}" if prefix else key
        found.update(_flat(value, name) if isinstance(value, dict) else {name: value})
    return found


def _own(configs: list[str], overlay: str) -> tuple[str, ...]:
    """Return the configs that differ from those of the package, as phrases; the overlay is a difference of its own."""
    used = [config for config in configs if overlay == "none" or config is not configs[-1]]
    return tuple(f"own config {config}" for config in used if not _is_packaged(Path(config)))


def _is_packaged(config: Path) -> bool:
    ours = packaged() / config  # an absolute path stays as it is
    inside = ours.is_relative_to(packaged() / "configs") and ours.is_file()
    return inside and (not config.is_file() or config.read_bytes() == ours.read_bytes())


def _differences(recipe: dict[str, Any], options: dict[str, Any], overlay: str, rate: float | None) -> tuple[str, ...]:
    """Return the differences between a run, whose noise has this rate, and that of the configs alone."""
    found = [] if overlay == "none" else [f"overlay {overlay}"]
    for name, value in options.items():
        before = recipe.get(name)
        told = name == "model.probe" or (name == "model.noise_rate" and value == rate)  # as in the published runs
        if name.startswith(MACHINE) or before == value or told:
            continue
        if name == "trainer.max_epochs":
            found.append(f"{value} epochs" + (f" instead of {before}" if before is not None else ""))
        elif name == "data.max_train_samples":
            found.append(f"{value} training images")
        elif name in ("data.val_fraction", "data.track_test"):
            found.append(f"other selection split ({name} {value})")
        elif name.startswith("data.noise"):
            found.append(f"other noise ({name} {value})")
        elif name == "data" or name.startswith("data.image_size"):
            found.append(f"other data ({name} {value})")
        elif name.startswith("model.network"):
            found.append(f"other network ({name} {value})")
        else:
            found.append(f"{name} {value}")
    return tuple(found)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
