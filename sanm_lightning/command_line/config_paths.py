"""Config files on the command line: search path, order, and replacements of paths of earlier versions.

The package contains ``configs/method/``, ``data/``, ``setting/<method>/<set>[-<noise>].yaml``, ``noise/``,
``sanm.yaml`` with ``sanm/``, and ``views/``; they are given in this order.
"""

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sanm_lightning.command_line.yaml_keys import check_unique_keys

__all__ = ["check_keys", "check_order", "check_scheduler", "packaged", "resolve", "setting_for", "unused_setting"]

ORDER = "the order is method, data, setting, noise, sanm"
OLD_PATH = re.compile(r"configs/(?P<data>cifar100?)/(?P<method>[a-z0-9_]+)(/(?P<noise>[a-z0-9_]+))?\.ya?ml$")
NESTED_SCHEDULERS = {"SequentialLR": "Sequential", "ChainedScheduler": "Chained"}
SMALL = "_small"  # as in cross_entropy_small.yaml, now a setting


class Word(NamedTuple):
    """An option of the command line.

    Attributes:
        flag: the option with its dashes, such as ``--config``.
        value: the given value; None for an option at the end of the command line.
        place: position of the value in the arguments.
        joined: whether the option was written as ``flag=value``.
    """

    flag: str
    value: str | None
    place: int
    joined: bool

    @property
    def is_config(self) -> bool:
        """Whether the value is a config."""
        return self.flag in ("--config", "-c") and self.value is not None


def packaged() -> Path:
    """Return the folder that contains ``configs/``: the installed package, or the repository in development."""
    package = Path(str(files("sanm_lightning")))
    return package if (package / "configs").is_dir() else package.parent


def resolve(args: Sequence[str]) -> list[str]:
    """Replace each ``--config configs/...`` that does not exist locally with the file from the package.

    Args:
        args: the arguments of the command line.

    Returns:
        The arguments with the paths of existing files.

    Raises:
        ValueError: if a config is given by a path of an earlier version.
        FileNotFoundError: if a config does not exist; the message lists similar names.
    """
    out, old = list(args), []
    for word in _words(args):
        if not word.is_config or not _is_missing_file(word.value):
            continue
        assert word.value is not None
        inside = packaged() / word.value
        if Path(word.value).parts[0] == "configs" and inside.is_file():
            out[word.place] = f"{word.flag}={inside}" if word.joined else str(inside)
        elif _old_path(word.value):
            old.append(word.value)
        else:
            raise FileNotFoundError(f"expected an existing config, got {word.value!r}; {_near(word.value)}")
    if old:
        raise ValueError(
            f"expected separate configs for method and data set, got {' and '.join(map(repr, old))}; use "
            f"{_replacement(old)}"
        )
    return out


def check_keys(args: Sequence[str]) -> None:
    """Refuse config files with a repeated key, of which the parser keeps the last only.

    Args:
        args: the arguments of the command line, with paths of existing files.

    Raises:
        ValueError: if a file given as the value of an option has a key twice in one mapping.
    """
    for word in _words(args):
        if word.value and word.value.endswith((".yaml", ".yml")) and Path(word.value).is_file():
            with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # which the parser reports
                check_unique_keys(Path(word.value).read_text(encoding="utf-8"), word.value)


def check_order(args: Sequence[str]) -> None:
    """Require the class of model and data before their options; the parser's own message does not name the class.

    Args:
        args: the arguments of the command line, with paths of existing files.

    Raises:
        ValueError: if a config or an option sets options of a class that is not defined before it.
    """
    named: set[str] = set()
    for word in _words(args):
        content = _content(word.value) if word.is_config else {}
        for part, folder in (("model", "method"), ("data", "data")):
            if word.flag in (f"--{part}", f"--{part}.class_path"):
                named.add(part)
            options = content.get(part)
            if isinstance(options, str) or (isinstance(options, dict) and "class_path" in options):
                named.add(part)
            early = isinstance(options, dict) and options.get("init_args")
            early = early or (word.flag.startswith(f"--{part}.") and word.flag != f"--{part}.help")
            if early and part not in named:
                what = f"the config {word.value!r}" if word.is_config else f"the option {word.flag}"
                raise ValueError(
                    f"expected the class of the {part} before its options, got {what} first; add a config from "
                    f"configs/{folder}/, or --{part} CLASS, before it ({ORDER})"
                )


def check_scheduler(args: Sequence[str]) -> None:
    """Refuse schedulers of torch that require other schedulers as objects, and ambiguous names.

    Args:
        args: the arguments of the command line, with paths of existing files.

    Raises:
        ValueError: if a config or an option names such a scheduler.
    """
    for word in _words(args):
        model = _content(word.value).get("model") if word.is_config else None
        options = model.get("init_args") if isinstance(model, dict) else None
        given = options.get("scheduler") if isinstance(options, dict) else None
        if re.fullmatch(r"--model(\.init_args)?\.scheduler(\.class_path)?", word.flag):
            given = word.value
        given = given.get("class_path") if isinstance(given, dict) else given
        if given == "ReduceLROnPlateau":
            raise ValueError(
                "expected the full name of ReduceLROnPlateau, got the short name, which torch and Lightning share; use "
                "torch.optim.lr_scheduler.ReduceLROnPlateau, or lightning.pytorch.cli.ReduceLROnPlateau with a monitor"
            )
        name = str(given).rpartition(".")[2]
        if name in NESTED_SCHEDULERS:
            raise ValueError(
                f"expected a scheduler that is created from an optimizer and options, got {name}, which requires other "
                f"schedulers; use {NESTED_SCHEDULERS[name]}, with the same options"
            )


def unused_setting(args: Sequence[str]) -> str | None:
    """Return the published setting for the method, data and noise on the command line, if it is not used.

    Args:
        args: the arguments of the command line.

    Returns:
        A path under ``configs/``; None if there is none, or an equally specific one is given.
    """
    given: dict[str, str] = {}
    for word in _words(args):
        parts = Path(word.value).parts if word.is_config and word.value else ()
        for folder in ("method", "data", "setting", "noise"):
            if ("configs", folder) in itertools.pairwise(parts):
                given[folder] = Path(parts[-1]).stem
    if not {"method", "data"} <= given.keys():
        return None
    best = setting_for(given["method"], given["data"], given.get("noise"))
    as_specific = {given.get("setting"), given["data"] if "setting" in given else None}
    if best is None or Path(best).stem in as_specific:
        return None
    return best


def _words(args: Sequence[str]) -> Iterator[Word]:
    for place, argument in enumerate(args):
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            after = args[place + 1] if place + 1 < len(args) else None
            yield Word(flag, value, place, True) if equals else Word(flag, after, place + 1, False)


def _is_missing_file(value: str | None) -> bool:
    """Return whether a config is a path (not YAML text or a URL) to a file that does not exist."""
    if value is None or "\n" in value or "{" in value or "://" in value:
        return False
    return value.endswith((".yaml", ".yml", ".json")) and not Path(value).is_file()


def _content(value: str | None) -> dict[str, Any]:
    """Return the content of a config, with that of subcommands; empty if unreadable, which the parser then reports."""
    try:
        content = yaml.safe_load(Path(value).read_text() if value and Path(value).is_file() else value or "")
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    content = content if isinstance(content, dict) else {}
    for command in ("fit", "validate", "test", "predict"):  # sections of a config given before the subcommand
        if isinstance(content.get(command), dict):
            content = {**content, **content[command]}
    return content


def _near(value: str) -> str:
    """Return the part of an error message that lists the most similar configs of the package."""
    known = [path.relative_to(packaged()) for path in sorted((packaged() / "configs").rglob("*.yaml"))]
    known = [path for path in known if path.parent.name != "studies"]  # files of sanm study
    wanted = Path(value)
    ratio = {path: max(_similarity(str(wanted), str(path)), _similarity(wanted.name, path.name)) for path in known}
    near = [str(path) for path in sorted(known, key=lambda path: -ratio[path]) if ratio[path] > 0.7][:3]
    return f"near: {', '.join(near)}" if near else f"choose one from {packaged() / 'configs'}"


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def setting_for(method: str, data: str, noise: str | None) -> str | None:
    """Return the most specific existing setting, as a path under ``configs/``."""
    names = [f"{data}-{noise}", data] if noise else [data]
    paths = [f"configs/setting/{method}/{name}.yaml" for name in names]
    return next((path for path in paths if (packaged() / path).is_file()), None)


def _old_path(value: str) -> re.Match[str] | None:
    match = OLD_PATH.search(Path(value).as_posix())
    method = match["method"].removesuffix(SMALL) if match else ""
    return match if (packaged() / "configs" / "method" / f"{method}.yaml").is_file() else None


def _replacement(old: Sequence[str]) -> str:
    """Return the options that replace all old paths of one command line."""
    matches = [match for match in map(_old_path, old) if match]
    base = next((match for match in matches if match["noise"] is None), matches[0])  # C2D used DivideMix's overlays
    noise = next((match["noise"] for match in matches if match["noise"]), None)
    method, data = base["method"].removesuffix(SMALL), base["data"]
    setting = setting_for(method, data, "small" if base["method"].endswith(SMALL) else noise)
    paths = [f"configs/method/{method}.yaml", f"configs/data/{data}.yaml", *([setting] if setting else [])]
    words = [f"--config {path}" for path in paths]
    if noise and method in ("cdr", "co_teaching"):  # these overlays set the noise rate only
        words.append(f"--model.noise_rate {int(re.sub(r'[^0-9]', '', noise)) / 100}")
    return " ".join(words)
