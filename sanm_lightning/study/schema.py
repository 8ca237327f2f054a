"""The content of a study file: lists of methods, data, noise and seeds, whose product is the cells of the study."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from sanm_lightning.command_line.parsing import near_names
from sanm_lightning.command_line.yaml_keys import check_unique_keys

__all__ = ["Grid", "Study", "read_study"]

NAMES = ("methods", "sanm", "data", "noise", "overlays")
"""Keys of lists of names of configs."""
RESERVED = ("seed_everything", "ckpt_path", "weights", "config", "trainer.default_root_dir", "trainer.logger", "help")
"""Beginnings of options that are set for each cell, and the help."""
PARTS = ("model", "data", "trainer")
"""Sections of a config, whose options are named one by one."""
SEEDS = range(2**32)
"""Seeds that Lightning accepts."""


@dataclass(frozen=True)
class Grid:
    """A product of methods, SANM, data, noise, overlays and seeds.

    Attributes:
        methods: names of ``configs/method``.
        data: names of ``configs/data``.
        sanm: ``base`` (without SANM), ``sanm`` (``configs/sanm.yaml``), or names of ``configs/sanm``.
        noise: names of ``configs/noise``, or ``none`` for the labels of the data.
        overlays: ``none``, or configs that are given last, such as ``views/released``.
        seeds: values of ``--seed_everything``.
        name: part of the folders of the cells, to distinguish grids that differ in options only.
        known_rate: methods that are given the rate of the noise config as ``--model.noise_rate``.
        pretraining: by method, the method that is trained first on the same data without added noise; its checkpoint is given
            as ``--model.pretrained``.
        options: options of all cells, by the names of the command line without dashes, such as ``trainer.max_epochs``.
        method_options: further options by method.
    """

    methods: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    sanm: tuple[str, ...] = ("base",)
    noise: tuple[str, ...] = ("none",)
    overlays: tuple[str, ...] = ("none",)
    seeds: tuple[int, ...] = (1, 2, 3)
    name: str = ""
    known_rate: tuple[str, ...] = ()
    pretraining: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    method_options: dict[str, dict[str, Any]] = field(default_factory=dict)


KEYS = tuple(part.name for part in fields(Grid))


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: stem of the file.
        published: name of the table of published values; None if there is none.
        grids: the grids, with the keys that the file gives for all of them.
    """

    name: str
    published: str | None
    grids: tuple[Grid, ...]


def read_study(path: str | Path) -> Study:
    """Read a study file: the keys of :class:`Grid`, ``published``, and ``grids``, a list of mappings with the same keys.

    A key of a grid replaces that of the file; ``options`` and ``method_options`` are merged.

    Args:
        path: the YAML file.

    Raises:
        OSError: if the file does not exist.
        ValueError: if it is not valid YAML, a key is unknown or repeated, or a value has another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an existing study, got {str(path)!r}; check the path")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"expected a study in valid YAML, got {str(path)!r} ({reason}); correct the file") from error
    check_unique_keys(text, str(path))
    _check_keys(content, (*KEYS, "published", "grids"), path)
    published, grids = content.pop("published", None), content.pop("grids", [{}])
    if not isinstance(grids, list) or not grids:
        raise ValueError(
            f"expected a list of one or more grids in {str(path)!r}, got {grids!r}; write one entry per grid"
        )
    if not isinstance(published, str | None):
        raise ValueError(
            f"expected the name of a table for published in {str(path)!r}, got {published!r}; write one name"
        )
    for grid in grids:
        _check_keys(grid, KEYS, path)
    found = tuple(_grid({**content, **grid, **_merged(content, grid)}, path) for grid in grids)
    _check_methods(found, path)
    return Study(path.stem, published, found)


def _check_methods(grids: tuple[Grid, ...], path: Path) -> None:
    """Require that methods with own options are methods of a grid, or are trained before one."""
    methods = {method for grid in grids for method in (*grid.methods, *grid.pretraining.values())}
    for key in ("known_rate", "pretraining", "method_options"):
        for method in (name for grid in grids for name in getattr(grid, key)):
            if method not in methods:
                near = near_names(str(method), sorted(methods))
                remedy = f"near: {', '.join(near)}" if near else f"choose one of {', '.join(sorted(methods))}"
                raise ValueError(f"expected methods of the study for {key} in {str(path)!r}, got {method!r}; {remedy}")


def _merged(content: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a grid, over those of the file."""
    outer, inner = (part.get("method_options") or {} for part in (content, grid))
    by_method = {name: {**(outer.get(name) or {}), **(inner.get(name) or {})} for name in {**outer, **inner}}
    return {
        "options": {**(content.get("options") or {}), **(grid.get("options") or {})},
        "method_options": by_method,
    }


def _check_keys(content: Any, known: tuple[str, ...], path: Path) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping in the study {str(path)!r}, got {content!r}; see docs/studies.md")
    for key in content:
        if key not in known:
            near = near_names(str(key), known)
            remedy = f"near: {', '.join(near)}" if near else f"choose one of {', '.join(known)}"
            raise ValueError(f"expected a key of a study in {str(path)!r}, got {key!r}; {remedy}")
    for key in ("options", "pretraining", "method_options"):
        if not isinstance(content.get(key) or {}, dict):
            raise ValueError(f"expected a mapping for {key} in {str(path)!r}, got {content[key]!r}; write name: value")
    first = (content.get("pretraining") or {}).values()
    if not all(isinstance(name, str) for name in first):
        raise ValueError(
            f"expected one method for each method of pretraining in {str(path)!r}, got {[*first]!r}; write method: method"
        )
    options = content.get("method_options") or {}
    for where in (content.get("options") or {}, *(part or {} for part in options.values())):
        if not isinstance(where, dict):
            raise ValueError(f"expected a mapping of options in {str(path)!r}, got {where!r}; write name: value")
        nested = next(
            (name for name in where if name in PARTS and isinstance(where[name], dict)), None
        )  # as in a config
        if nested or not all(isinstance(name, str) for name in where):
            raise ValueError(
                f"expected options by their names on the command line in {str(path)!r}, got {where!r}; write "
                f"{nested or 'trainer'}.NAME: value"
            )
        reserved = next((name for name in where if name.startswith(RESERVED)), None)
        if reserved:
            raise ValueError(
                f"expected options that a study does not set itself in {str(path)!r}, got {reserved!r}; remove it, or use "
                "seeds and --out"
            )


def _grid(content: dict[str, Any], path: Path) -> Grid:
    content = {key: value for key, value in content.items() if key != "pretraining" or value is not None}
    for key in (*NAMES, "known_rate", "seeds"):
        kind, what = (int, "integers") if key == "seeds" else (str, "names")
        value = content.get(key, [])
        if not isinstance(value, list) or not all(type(part) is kind for part in value):
            raise ValueError(f"expected a list of {what} for {key} in {str(path)!r}, got {value!r}; write [A, B]")
        if key in content:
            content[key] = tuple(value)
    other = next((seed for seed in content.get("seeds", ()) if seed not in SEEDS), None)
    if other is not None:
        raise ValueError(f"expected seeds from 0 to {SEEDS[-1]} in {str(path)!r}, got {other}; choose other seeds")
    grid = Grid(**content)
    if not isinstance(grid.name, str) or not re.fullmatch(r"[\w.-]*", grid.name) or grid.name.startswith("."):
        raise ValueError(
            f"expected a name of letters, digits, '_', '-' and '.' in {str(path)!r}, got {grid.name!r}; correct it"
        )
    for key in (*NAMES, "seeds"):
        if not getattr(grid, key):
            raise ValueError(
                f"expected one or more {key} in {str(path)!r}, got none; add them to the study or its grids"
            )
    return grid
