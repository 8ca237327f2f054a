"""Check of YAML files for repeated keys, of which YAML parsers keep the last without a word."""

from collections.abc import Iterator

import yaml

__all__ = ["check_unique_keys"]


def check_unique_keys(text: str, where: str) -> None:
    """Require that no mapping of a YAML document has a key twice.

    Args:
        text: the document.
        where: name of the file, for the message.

    Raises:
        ValueError: if a mapping has a key twice.
        yaml.YAMLError: if the document is not valid YAML.
    """
    for node in _mappings(yaml.compose(text, yaml.SafeLoader)):
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if (key.tag, key.value) in first:
                raise ValueError(
                    f"expected each key of a mapping once in {where!r}, got {key.value!r} in lines "
                    f"{first[key.tag, key.value]} and {line}; remove one of them"
                )
            first[key.tag, key.value] = line


def _mappings(node: yaml.Node | None, seen: set[int] | None = None) -> Iterator[yaml.MappingNode]:
    """Iterate over the mappings of a document, once for each alias."""
    seen = set() if seen is None else seen
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for key, value in node.value:
            yield from _mappings(key, seen)
            yield from _mappings(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _mappings(part, seen)
