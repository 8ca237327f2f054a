"""Class names of a data set and of a checkpoint, compared."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["class_names_of", "named_classes", "real_names", "refuse_other_classes"]

SHOWN = 5
"""Names that an error shows."""


def named_classes(data: Any) -> list[str] | None:
    """Return the class names of a data module, of any kind; None where it has none, or only the numbers 0 to C - 1."""
    return real_names(getattr(data, "class_names", None))


def real_names(names: Any) -> list[str] | None:
    """Return class names as a list; None where they are no list of strings, or only the numbers 0 to C - 1."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    return None if list(names) == [str(number) for number in range(len(names))] else list(names)


def class_names_of(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the C classes of a checkpoint, in the order of the class indices.

    They are looked for under ``class_names``, in the hyper-parameters, and in the state of the data module; without any, they
    are the numbers 0 to C - 1.

    Args:
        checkpoint: of a method of this package.

    Raises:
        ValueError: the checkpoint does not hold the number of classes.
    """
    settings = checkpoint.get("hyper_parameters") or {}
    number = settings.get("num_classes")
    if not isinstance(number, int):
        raise ValueError(f"expected a checkpoint with a number of classes, got {number!r}; is it one of a method?")
    states = [part for part in checkpoint.values() if isinstance(part, Mapping) and "draws" in part]
    for held in (checkpoint, settings, *states):
        names = real_names(held.get("class_names"))
        if names is not None and len(names) == number:
            return names
    return [str(label) for label in range(number)]


def refuse_other_classes(now: Sequence[str] | None, then: Sequence[str] | None) -> None:
    """Compare class names of the data with those that a checkpoint was made with; nothing is compared where one is None.

    Args:
        now: names in the order of the class indices.
        then: those of the checkpoint.

    Raises:
        ValueError: the names are others, or in another order: class indices would mean other classes.
    """
    if now is None or then is None or list(now) == list(then):
        return
    more = [f"{_shown(names)} only in {where}" for names, where in ((_without(now, then), "the data"),
            (_without(then, now), "the checkpoint")) if names]  # fmt: skip
    if not more:
        place = next(i for i, (one, other) in enumerate(zip(now, then, strict=False)) if one != other)
        more = [f"the same names in another order, class {place} being {now[place]!r} and not {then[place]!r}"]
    raise ValueError(
        f"expected the {len(then)} classes of the checkpoint, got {' and '.join(more)}; give the data their names and order, "
        "or train on these data"
    )


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if name not in set(others)]


def _shown(names: list[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + rest
