"""Published accuracies, from ``published.yaml``."""

import functools
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from sanm_lightning.command_line.parsing import near_names

__all__ = ["Published", "read_published"]


class Published(NamedTuple):
    """Published values of a table.

    Attributes:
        source: paper and table.
        values: accuracies in percent by (method, SANM, data, noise), with the keys ``best``, ``last`` and ``spread``.
        notes: why a value is not that of the method, by (method, SANM, data, noise); only for such values.
    """

    source: str
    values: dict[tuple[str, str, str, str], dict[str, float]]
    notes: dict[tuple[str, str, str, str], str]


def read_published(table: str) -> Published:
    """Return the published values of a table.

    Args:
        table: key in ``published.yaml``, the name of a study.

    Raises:
        ValueError: if there is no such table.
    """
    content = _tables()
    if table not in content:
        near = near_names(table, list(content))
        remedy = f"near: {', '.join(near)}" if near else f"choose one of {', '.join(content)}"
        raise ValueError(f"expected a table of published values, got {table!r}; {remedy}")
    columns = [(data, noise) for data, noises in content[table]["columns"].items() for noise in noises]
    values: dict[tuple[str, str, str, str], dict[str, float]] = {}
    notes: dict[tuple[str, str, str, str], str] = {}
    for row in content[table]["rows"]:
        for kind in ("best", "last", "spread"):
            for (data, noise), value in zip(columns, row.get(kind) or [], strict=kind in row):
                key = row["method"], row.get("sanm", "base"), data, noise
                if value is not None:
                    values.setdefault(key, {})[kind] = value
                if value is not None and "note" in row:
                    notes[key] = row["note"]
    return Published(content[table]["source"], values, notes)


@functools.cache
def _tables() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(files("sanm_lightning.study").joinpath("published.yaml").read_text())
    return content
