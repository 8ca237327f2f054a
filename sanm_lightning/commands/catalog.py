"""``sanm list``: the methods, data sets and configs of the package, with sources and recorded runs."""

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

import sanm_lightning.data
import sanm_lightning.methods
from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.command_line.parsing import CommandParser, near_names

__all__ = ["CATALOGS", "catalog", "main"]

FOLDERS = {"noise": "noise", "views": "views", "settings": "setting", "studies": "studies"}
SOURCE = re.compile(r"Source: (?P<source>.+?\b(?:19|20)\d\d\)?)")
YEAR = re.compile(r"\((?P<source>[^()]*\b(?:19|20)\d\d)\)")
FIRST_SENTENCE = re.compile(r"(.+?)\.?(?: (?=sanm fit )|(?<=\.) (?=[A-Z])|$)")
NOT_RUNS = {"command", "note", "what", "data", "machine", "views"}
"""Keys of a results file whose content may name a method that was not run."""


def catalog(what: str) -> list[tuple[str, ...]]:
    """Return the rows of a list, the first of which is the header.

    Args:
        what: one of :data:`CATALOGS`.

    Raises:
        ValueError: if there is no such list.
    """
    if what not in CATALOGS:
        near = near_names(what, list(CATALOGS)) or ["methods"]
        raise ValueError(
            f"expected one of {', '.join(CATALOGS)} after 'sanm list', got {what!r}; use 'sanm list {near[0]}'"
        )
    return CATALOGS[what]()


def _methods() -> list[tuple[str, ...]]:
    """Return config, class, source and recorded runs of every method."""
    rows: list[tuple[str, ...]] = [("method", "class", "source", "recorded runs (results/)")]
    recorded = _recorded()
    for path in _configs("method"):
        name = _class_of(path, "model")
        kind = getattr(sanm_lightning.methods, name)
        files = sorted(file for file, methods in recorded.items() if path.stem in methods)
        rows.append((path.stem, name, _source(path, kind), ", ".join(files) or "none"))
    return rows


def _data() -> list[tuple[str, ...]]:
    """Return config, class and description of every data set."""
    rows = [("data", "class", "description")]
    return [*rows, *((path.stem, _class_of(path, "data"), _description(path)) for path in _configs("data"))]


def _all_configs() -> list[tuple[str, ...]]:
    return _described(sorted((packaged() / "configs").rglob("*.yaml")))


def _sanm() -> list[tuple[str, ...]]:
    return _described([packaged() / "configs" / "sanm.yaml", *_configs("sanm")])


def _folder(name: str) -> Callable[[], list[tuple[str, ...]]]:
    return lambda: _described(_configs(FOLDERS[name]))


CATALOGS: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "methods": _methods,
    "data": _data,
    "configs": _all_configs,
    "noise": _folder("noise"),
    "sanm": _sanm,
    "views": _folder("views"),
    "settings": _folder("settings"),
    "studies": _folder("studies"),
}
"""Functions that return the rows of each list, by its name on the command line."""


def _configs(folder: str) -> list[Path]:
    return sorted((packaged() / "configs" / folder).rglob("*.yaml"))


def _described(paths: list[Path]) -> list[tuple[str, ...]]:
    """Return path and description of configs, as given to ``--config``."""
    rows = [("config", "description")]
    return [*rows, *((path.relative_to(packaged()).as_posix(), _description(path)) for path in paths)]


def _comment(path: Path) -> str:
    """Return the comment at the beginning of a config as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def _description(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a config."""
    found = FIRST_SENTENCE.match(_comment(path))
    return found[1] if found else ""


def _class_of(path: Path, part: str) -> str:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(content[part]["class_path"]).rpartition(".")[2]


def _source(path: Path, kind: type) -> str:
    """Return the paper of a method: that of its config, else that of its module."""
    module = importlib.import_module(kind.__module__)
    found = SOURCE.search(_comment(path)) or YEAR.search((module.__doc__ or "").splitlines()[0])
    return found["source"] if found else ""


def _recorded() -> dict[str, set[str]]:
    """Return the methods of the runs in each results file; empty where the package is installed without results/."""
    files = sorted(path for path in (packaged() / "results").rglob("*.json") if path.stem != "forward_passes")
    named = {path.stem.replace("_", ""): path.stem for path in _configs("method")}
    return {
        path.stem: {
            named.get(_method_name(word, named), "") for word in _words(json.loads(path.read_text(encoding="utf-8")))
        }
        for path in files
    }


def _method_name(word: str, known: Collection[str]) -> str:
    """Return the longest known name that a word such as ``CoTeaching`` or ``elr_plus_sanm`` begins with, else ``""``."""
    parts = word.lower().split("_")
    beginnings = ("".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in beginnings if name in known), "")


def _words(content: Any) -> Iterator[str]:
    """Yield the words of all keys and texts of a results file, except those of :data:`NOT_RUNS`."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in NOT_RUNS:
                yield from re.findall(r"\w+", key)
                yield from _words(value)
    elif isinstance(content, list):
        for value in content:
            yield from _words(value)
    elif isinstance(content, str):
        yield from re.findall(r"\w+", content)


def main(words: list[str]) -> int:
    """Parse the arguments of ``sanm list``, print the list and return exit status 0."""
    parser = CommandParser(prog="sanm list", description="List the methods, data sets and configs of the package.")
    parser.add_argument(
        "what", nargs="?", type=str, default="methods", help=f"{', '.join(CATALOGS)}; configs are paths for --config"
    )
    what = parser.parse_args(words).what
    rows = catalog(what)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(rows) == 1:
        print(f"no {what} in {packaged() / 'configs'}")
    return 0
