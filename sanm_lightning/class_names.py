"""Compare the class names of a data set with those of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["class_names_of", "named_classes", "real_names", "refuse_other_classes"]

SHOWN = 5
"""Maximum number of names in an error message."""


def named_classes(data: Any) -> list[str] | None:
    """Return the class names of any data module; None if it has none, or only the numbers 0 to C - 1."""
    return real_names(getattr(data, "class_names", None))


def real_names(names: Any) -> list[str] | None:
    """Return class names as a list; None if they are not a list of strings, or only the numbers 0 to C - 1."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return None if list(names) == [str(number) for number in range(len(names))] else list(names)


def class_names_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the C classes of a checkpoint, in the order of the class indices.

    They are read from ``class_names``, the hyper-parameters, or the state of the data module; otherwise, they are the
    numbers 0 to C - 1.

    Args:
        checkpoint: checkpoint of a method of this package.

    Raises:
        ValueError: if the checkpoint does not contain the number of classes.
    """
    settings = checkpoint.get("hyper_parameters") or {}
    number = settings.get("num_classes")
    if not isinstance(number, int):
        raise ValueError(
            f"expected a checkpoint with a number of classes, got {number!r}; use a checkpoint of a method"
        )
    states = [part for part in checkpoint.values() if isinstance(part, Mapping) and "draws" in part]
    for held in (checkpoint, settings, *states):
        names = real_names(held.get("class_names"))
        if names is not None and len(names) == number:
            return names
    return [str(label) for label in range(number)]


def refuse_other_classes(now: Sequence[str] | None, then: Sequence[str] | None) -> None:
    """Raise an error if the class names of the data differ from those of a checkpoint; None is equal to any names.

    Args:
        now: names of the data in the order of the class indices.
        then: names of the checkpoint in the order of the class indices.

    Raises:
        ValueError: if names or order differ, so that class indices would refer to other classes.
    """
    if now is None or then is None or list(now) == list(then):
        return
    more = [f"{_shown(names)} only in {where}" for names, where in ((_without(now, then), "the data"),
            (_without(then, now), "the checkpoint")) if names]  # fmt: skip
    if not more:
        place = next(i for i, (one, other) in enumerate(zip(now, then, strict=False)) if one != other)
        more = [f"the same names in another order, with class {place} {now[place]!r} instead of {then[place]!r}"]
    raise ValueError(
        f"expected the {len(then)} classes of the checkpoint, got {' and '.join(more)}; use the same names and "
        "order, or train on these data"
    )


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name not in set(others)]


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + rest
