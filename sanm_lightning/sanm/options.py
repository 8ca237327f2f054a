"""Check the options of SANM, and convert them to built-in types that load safely from a checkpoint."""

import inspect
import pkgutil
from functools import partial
from typing import Any

__all__ = ["bound_arguments", "check_ranges", "created_from", "found_by_path", "made_from", "path_of", "plain"]


def check_ranges(low: Any, high: Any, options: dict[str, Any]) -> None:
    """Check the ranges of SANM's arguments.

    Args:
        low: lower bound of the ratio range.
        high: upper bound of the ratio range.
        options: the other arguments by name.

    Raises:
        ValueError: if an argument is out of its range.
    """
    for name in ("mu", "delta", "beta", "area"):
        _require(isinstance(options[name], (int, float)), f"a number as {name}", options[name], "use a number")
    _require(0 <= options["mu"] <= 1, "mu in [0, 1]", options["mu"], "use 0.3, the default")
    for name, default in (("delta", 0.8), ("area", 1)):
        _require(0 < options[name] <= 1, f"{name} in (0, 1]", options[name], f"use {default}, the default")
    _require(options["beta"] >= 0, "beta >= 0", options["beta"], "use 0.02, the default")
    ordered = 0 <= low <= 1 and 0 <= high <= 1 and low <= high
    _require(ordered, "0 <= low <= high <= 1 in ratio_range", (low, high), "use [0.2, 0.4], for example")
    words = {
        "fill": ("pixel", "channel"),
        "anchor": ("center", "corner", "inside"),
        "regions": ("peak", "peak_and_trough"),
        "spread": ("all", "others", "smoothing"),
        "scale": ("unit", "normalized"),
    }
    for name, known in words.items():
        listed = " or ".join([", ".join(map(repr, known[:-1])), repr(known[-1])])
        _require(options[name] in known, f"{name} {listed}", options[name], "choose one of these")
    levels = options["map_levels"]
    whole = levels is None or (isinstance(levels, int) and levels >= 2)
    _require(whole, "map_levels >= 2 or null", levels, "use null for all values")
    warmup = options["warmup_epochs"]
    ahead = warmup is None or warmup >= 0
    _require(ahead, "warmup_epochs >= 0 or null", warmup, "use null for the warm-up of the method")


def path_of(thing: Any) -> str:
    """Return the import path of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def found_by_path(path: Any) -> Any:
    """Import a class or function by its import path.

    Raises:
        ValueError: if the path cannot be imported.
    """
    try:
        return pkgutil.resolve_name(str(path))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"expected a valid import path, got {path!r} ({error}); make its module importable") from error


def made_from(option: dict[str, Any]) -> Any:
    """Create an object from class path and arguments, or import a function, as saved by :func:`plain`.

    Raises:
        ValueError: if the path cannot be imported.
    """
    found, arguments = found_by_path(option["class_path"]), option.get("init_args") or {}
    if isinstance(found, type):
        return found(**arguments)
    return partial(found, **arguments) if arguments else found


def created_from(base: Any, options: dict[str, Any]) -> Any:
    """Create an object from the arguments of the class ``base``, or from class path and arguments of a subclass.

    Raises:
        ValueError: if the class path is not that of a subclass.
    """
    if "class_path" not in options:
        return base(**options)
    kind = found_by_path(options["class_path"])
    if not (isinstance(kind, type) and issubclass(kind, base)):
        name = base.__name__
        raise ValueError(
            f"expected the class path of a subclass of {name}, got {options['class_path']!r}; derive the class from {name}"
        )
    return kind(**(options.get("init_args") or {}))


def plain(value: Any) -> Any:
    """Convert an argument to built-in types.

    Objects with ``options`` (their constructor arguments) are converted to class path and arguments, functions to their
    path. Objects that cannot be imported, such as lambdas, are converted to a string, for which :class:`SANM` raises an
    error with their name.
    """
    if not callable(value):
        return value
    if isinstance(getattr(value, "options", None), dict):
        return {"class_path": path_of(type(value)), "init_args": dict(value.options)}
    named = value if hasattr(value, "__qualname__") else type(value)
    path = path_of(named)
    try:
        return {"class_path": path} if found_by_path(path) is value else path
    except ValueError:
        return path


def bound_arguments(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a constructor by name, including ``**kwargs``, as built-in types.

    Raises:
        TypeError: if the arguments do not match the signature, or ``*args`` are used, which have no name.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs).arguments
    given: dict[str, Any] = {}
    for place, (name, value) in enumerate(bound.items()):
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL and value:
            raise TypeError(
                "expected arguments by name, got arguments without a name; use keyword arguments, which checkpoints "
                "can save"
            )
        if place and kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        elif place:
            given[name] = value
    return {name: plain(value) for name, value in given.items()}


def _require(condition: bool, expected: str, got: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"expected {expected}, got {got!r}; {remedy}")
