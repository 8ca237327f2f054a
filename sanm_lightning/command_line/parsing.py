"""Argument parser with errors in one sentence and with short help; depends on the messages of jsonargparse."""

import difflib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning as L
import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from sanm_lightning.sanm.module import SANM
from sanm_lightning.sanm.quality import QualityEstimator

__all__ = ["CommandParser", "TrainingParser", "near_names", "parser_sentence", "plain_strings"]

BASES: dict[str, type] = {
    "model": L.LightningModule, "data": L.LightningDataModule, "callbacks": L.Callback, "logger": Logger,
    "optimizer": torch.optim.Optimizer, "scheduler": torch.optim.lr_scheduler.LRScheduler, "sanm": SANM,
    "quality": QualityEstimator,
}  # fmt: skip
"""Base class of the classes that an option accepts, by the last part of its name."""

BASE_MODULES = ("LightningModule", "LightningDataModule")
"""Base classes that options belong to as long as no class is given."""
KEY = re.compile(r'Parser key "([^"]+)"')
OWNER = re.compile(r"Problem with given class_path '([^']+)':")
UNKNOWN_OPTIONS = (
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"Subcommand '\w+' does not accept option '(?P<name>[^']+)'"),
    re.compile(r"unrecognized arguments: (?P<name>[^\s=]+)"),
)
NO_CLASS = re.compile(r"Expected a dot import path string: (?P<name>.+)")
NOT_IMPORTED = re.compile(r"(?P<reason>No module named .+|module .+ has no attribute .+)")
OTHER_CLASS = re.compile(r"Import path does not correspond to a subclass of (?P<base>\w+)")
VALUE = re.compile(r"Expected a (?P<type>.+?)\. Got value:\s?(?P<value>.*?)(?:\. Got value: .*)?$")
UNION = re.compile(r"Subtypes: \[(?P<type>.+)\]")
HELPED = re.compile(r"Help for --(?P<option>[\w.]+)\.help=(?P<path>\S+)")
"""Description of jsonargparse for the parser that prints the help of a class."""
TYPED: ContextVar[Sequence[Any]] = ContextVar("TYPED", default=())
"""Arguments of the command that is parsed."""
LONG_LISTS = re.compile(r", known subclasses: torch\.(nn\.Module|utils\.data\.Dataset),[^)]*")
SUBCLASSES = re.compile(r"known subclasses: ([^)]+)")
INTERNAL = re.compile(r"lightning\.Lightning(Data)?Module|sanm_lightning(\.\w+){3,}")
"""Classes that are not for users: Lightning's base classes, and those that no package exports."""
DATA_MODULE = "A DataModule standardizes"
"""Beginning of the docstring of ``LightningDataModule``."""
SECTION = re.compile(
    r"Parser key \"(?P<key>[^\"]+)\":\nUnable to load config (?P<value>'.*?'|\".*?\")\n(?P<reason>.+)", re.DOTALL
)
GIVEN = re.compile(r"Given value: (?P<value>.*?)(?:\. Got value: .*)?$")


class ShortHelp(DefaultHelpFormatter):
    """Help without classes that are not public, and without the many subclasses of torch's ``Module`` and ``Dataset``."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options; the first line of Lightning's docstring is not a sentence."""
        super().start_section("data module" if heading and heading.startswith(DATA_MODULE) else heading)

    def _get_help_string(self, action: Any) -> str:
        return SUBCLASSES.sub(_public, LONG_LISTS.sub("", super()._get_help_string(action)))


def _public(listed: re.Match[str]) -> str:
    """Return a list of subclasses without internal ones, unless it would be empty."""
    names = [name for name in listed[1].split(", ") if not INTERNAL.fullmatch(name)]
    return f"known subclasses: {', '.join(names) or listed[1]}"


class CommandParser(ArgumentParser):
    """Parser of jsonargparse that raises a ValueError with one sentence, instead of printing the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": ShortHelp, "allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse the arguments, and keep those of the command for the help of nested classes."""
        token = TYPED.set(TYPED.get() or (sys.argv[1:] if args is None else args))
        try:
            return super().parse_args(args, *more, **options)
        finally:
            TYPED.reset(token)

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, *more: Any, **options: Any) -> Any:
        """Add the arguments of a class, in its help by the names to type, of which jsonargparse omits the outer part."""
        helped = HELPED.match(self.description or "")
        words = [str(word).partition("=")[0] for word in TYPED.get()] if helped else []
        typed = next((word for word in words if helped and word.endswith(f".{helped['option']}.help")), None)
        if helped and typed:
            self.description = f"Help for {typed}={helped['path']}"
            nested_key = typed.removeprefix("--").removesuffix(".help")
        return super().add_class_arguments(theclass, nested_key, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Raises:
            ValueError: always, except in parsers of nested classes, whose errors are part of a longer message.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        raise ValueError(parser_sentence(message, getattr(ex, "subcommand_parser", None) or self)) from ex


class TrainingParser(CommandParser, LightningArgumentParser):
    """Parser of LightningCLI with the errors and the help of :class:`CommandParser`."""


def plain_strings(value: Any) -> Any:
    """Convert members of string enumerations, such as defaults of Lightning's ``Timer``, to strings, which YAML can hold.

    Args:
        value: a parsed configuration, modified in place, or a part of it.
    """
    if isinstance(value, Namespace):
        for name, part in vars(value).items():
            setattr(value, name, plain_strings(part))
    elif isinstance(value, list):
        value[:] = map(plain_strings, value)
    elif isinstance(value, str) and isinstance(value, Enum):
        return str(value.value)
    return value


class _Place(NamedTuple):
    """A line of an error message with its context.

    Attributes:
        text: the line.
        key: name of the option, such as ``model.sanm.mu``; empty for an option of the command.
        owner: class path that the option belongs to; empty for an option of the command.
        after: the following lines of the same or a lower indentation.
    """

    text: str
    key: str
    owner: str
    after: list[str]


def parser_sentence(message: str, parser: Any) -> str:
    """Return a message of jsonargparse as one sentence: what was expected, what was given, and similar names.

    Args:
        message: the message, in which alternative types and nested classes are lists of lines.
        parser: the parser that the message is about, which has the known options.
    """
    places = list(_places(message))
    for find in (_unknown_option, _unknown_class, _wrong_value, _no_import_path, _invalid_part):
        for place in places:
            sentence = find(place, parser)
            if sentence:
                return sentence
    return _of_argparse(message.strip(), parser)


def _places(message: str) -> Iterator[_Place]:
    lines = [line for line in message.splitlines() if line.strip()]
    open_keys: list[tuple[int, str]] = []
    owners: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip(" "))  # that of its dash for the first line of an item of a list
        open_keys = [(depth, key) for depth, key in open_keys if depth < indent]
        owners = [(depth, owner) for depth, owner in owners if depth < indent]
        for pattern, stack in ((KEY, open_keys), (OWNER, owners)):
            found = pattern.search(line)
            if found:
                stack.append((indent, found[1]))
        key, owner = ".".join(part for _, part in open_keys), owners[-1][1] if owners else ""
        yield _Place(line.strip(" -"), key, owner, lines[number + 1 :])


def _unknown_option(place: _Place, parser: Any) -> str | None:
    found = next((match for pattern in UNKNOWN_OPTIONS if (match := pattern.search(place.text))), None)
    if found is None:
        return None
    typed = found["name"]
    name = ".".join(filter(None, (found.groupdict().get("group"), typed.lstrip("-"))))
    instance = re.search(r"class_path='([^']+)'", place.text)  # of an option with a function as its value
    owner = instance[1] if instance else place.owner
    if _last(owner) in BASE_MODULES:
        return (
            f"expected the class of the {place.key} before its options, got {f'{place.key}.{name}'!r}; add "
            f"--{place.key} CLASS before it"
        )
    if owner:
        what, see = f"an option of {_last(owner)}", f"'--{place.key}.help {_last(owner)}'"
        near = [f"{place.key}.{other}" for other in near_names(name, _options_of_class(owner))]
        given = f"{place.key}.{name}"
    else:
        what, see = f"an option of {_command(parser)}", f"'{_command(parser)} --help'"
        near = near_names(name, _options_of(parser)) or near_names(name.split(".")[0], _options_of(parser))
        given = typed
        if typed.startswith("-"):
            near = [f"--{other}" for other in near]
        elif place.text.startswith("unrecognized"):
            return f"expected options only, got {typed!r}; see {see}"
    return f"expected {what}, got {given!r}; " + (f"near: {', '.join(near)}" if near else f"see {see}")


def _unknown_class(place: _Place, parser: Any) -> str | None:
    helped = re.match(r"(?:--)?(\S+)\.help: ", place.text)
    part = ".".join(filter(None, (place.key, helped and helped[1])))
    base = BASES.get(part.rpartition(".")[2])
    found = NO_CLASS.search(place.text) if base else None
    if found and base:
        name = found["name"].strip()
        near, known = near_names(name, _classes(base), cutoff=0.6), _classes(base, public=True)
        others = f"choose one of {', '.join(known)}, or an import path" if known else "use an import path"
        remedy = f"near: {', '.join(near)}" if near else others
        return f"expected the name of a class for {part}, got {name!r}; {remedy}"
    found = NOT_IMPORTED.fullmatch(place.text)
    if found:
        return (
            f"expected an importable class for {part}, got {place.owner!r} ({found['reason']}); check the import path"
        )
    found = OTHER_CLASS.search(place.text)
    if found:
        given = next((match["value"] for line in place.after if (match := GIVEN.search(line))), "another class")
        return f"expected a subclass of {found['base']} for {part}, got {given!r}; use another class"
    return None


def _no_import_path(place: _Place, parser: Any) -> str | None:
    found = NO_CLASS.search(place.text)
    if found is None:
        return None
    part = place.key or "the option"
    return f"expected the import path of a class for {part}, got {found['name'].strip()!r}; use package.module.Class"


def _wrong_value(place: _Place, parser: Any) -> str | None:
    found = VALUE.search(place.text)
    kind, value = (found["type"], found["value"]) if found else (None, None)
    union = UNION.search(place.text)
    if union and not any(KEY.search(line) or OWNER.search(line) for line in place.after):
        kind = union["type"]
        value = next((match["value"] for line in place.after if (match := GIVEN.search(line))), "")
    if kind is None:
        return None
    choices = re.findall(r"Literal\[([^\]]+)\]", kind)
    rest = re.sub(r"(typing\.)?Literal\[[^\]]+\](, )?", "", kind)
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", rest).replace("NoneType", "null")
    types = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", types).strip(", ")
    types = re.sub(r", (?=\w+$)", " or ", types)
    if choices:
        listed = ", ".join(filter(None, (", ".join(choices), types)))
        near = near_names(str(value), re.findall(r"'([^']+)'", listed))
        return f"expected {place.key} to be one of {listed}, got {value!r}; " + (
            f"near: {', '.join(near)}" if near else "choose one of these"
        )
    return f"expected {place.key} of type {types}, got {value!r}; use a value of this type"


def _invalid_part(place: _Place, parser: Any) -> str | None:
    """Return a sentence for any other message about a part of the configuration, which names the part."""
    frame = ("Parser key", "Problem with", "Does not validate", "Subtypes:", "Errors:", "Expected a", "Given value")
    if not place.key or place.text.startswith(frame):
        return None
    reason = re.sub(r"^Type .* expects a function or a callable class: |\. Got value: .*$", "", place.text)
    number = re.fullmatch(r"'(\w+)' object has no attribute 'keys'", reason)
    if number:
        return f"expected options by name in init_args of {place.key}, got a value of type {number[1]}; use a mapping"
    return f"expected valid options of {place.key}, got {reason!r}; see '{_command(parser)} --help'"


def _of_argparse(message: str, parser: Any) -> str:
    """Return one of the messages about whole arguments as a sentence; the last form fits any message."""
    see = f"see '{_command(parser)} --help'"
    missing = re.search(r"the following arguments are required: (.+)", message)
    if missing:
        found = re.match(r"(fit|validate|test|predict)\.", missing[1])
        names = [f"--{name.removeprefix(found[0] if found else '')}" for name in missing[1].split(", ")]
        see = f"see '{_command(parser)} {found[1]} --help'" if found else see
        return f"expected a value for {' and '.join(sorted(names, reverse=True))}, got none; {see}"
    found = re.search(r"argument (?P<name>\S+): invalid choice: '(?P<value>.*)' \(choose from (?P<known>.+)\)", message)
    if found:
        known = re.findall(r"[\w-]+", found["known"])
        known += _commands() if found["name"] == "subcommand" else []
        near = near_names(found["value"], known)
        what = "a command" if found["name"] == "subcommand" else found["name"]
        return f"expected {what} among {', '.join(known)}, got {found['value']!r}; " + (
            f"near: {', '.join(near)}" if near else see
        )
    if 'expected "subcommand"' in message:
        return f"expected a command among fit, validate, test, predict, {', '.join(_commands())}, got none; {see}"
    found = re.search(r"argument (\S+): expected (.+)", message)
    if found:
        return f"expected {found[2]} after {found[1]}, got none; {see}"
    found = re.search(r"ambiguous option: (\S+) could match (.+)", message)
    if found:
        return f"expected an option of {_command(parser)}, got {found[1]!r}; near: {found[2]}"
    found = SECTION.match(message)
    if found and found["key"] != "config":
        what = f"under {found['key']!r}, got {found['value']}"
        if "Unable to load config" in found["reason"]:
            return f"expected options {what}; use a mapping, or the path of a config"
        return f"expected options in valid YAML {what}, which cannot be parsed ({_line(found['reason'])}); correct it"
    found = re.search(
        r"(?:File does not exist: '?(.+?)'?|Unable to load config [\"'](.+)[\"'])$", message.splitlines()[-1]
    )
    if found:
        return f"expected an existing config, got {(found[1] or found[2])!r}; check the path"
    found = re.search(r"Problems parsing config: (.+)", message, re.DOTALL)
    if found:
        return f"expected configs in valid YAML, got a file that cannot be parsed ({_line(found[1])}); correct the file"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return f"expected valid options of {_command(parser)}, got {' '.join(lines[-2:])}; {see}"


def _line(reason: str) -> str:
    """Return an error message of YAML as one line."""
    return " ".join(reason.replace('in "<unicode string>", ', "in ").lstrip(" -").split())


def near_names(name: str, known: Sequence[str], cutoff: float = 0.7) -> list[str]:
    """Return up to three known names that are similar to a name, by a similarity in [0, 1] that ignores case."""
    by_lower = {other.lower(): other for other in known}
    return [by_lower[other] for other in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)]


def _classes(base: type, public: bool = False) -> list[str]:
    """Return the names of the imported subclasses of a class, itself included; if asked, the public ones of this package."""
    found: dict[str, type] = {}
    left: list[type] = [base]
    while left:
        one = left.pop()
        children: list[type] = type.__subclasses__(one)
        left += [child for child in children if child.__name__ not in found]
        found[one.__name__] = one
    rooms = [sys.modules.get(f"sanm_lightning{room}") for room in ("", ".data", ".sanm", ".pictures", ".audit")]
    named = {name for room in rooms for name in getattr(room, "__all__", ()) if getattr(room, name) is found.get(name)}
    return sorted(named - {"NoisyLabelModule", "NoisyDataModule"} if public else found)


def _options_of_class(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    inner = ArgumentParser(exit_on_error=False)
    try:
        inner.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    except Exception:  # the names only improve a message about another error
        return []
    return _options_of(inner)


def _options_of(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions if action.option_strings and not action.dest.endswith("help")]


def _commands() -> list[str]:
    from sanm_lightning.commands import COMMANDS

    return [name for name in COMMANDS if " " not in name]


def _command(parser: Any) -> str:
    return str(Path(parser.prog).name if "/" in parser.prog else parser.prog).replace(" [options]", "")


def _last(path: str) -> str:
    return path.rpartition(".")[2]
