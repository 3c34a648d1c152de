"""Reads untrusted YAML: plain values only, and no larger than a recipe can be."""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 2**18
"""The longest shipped recipe has 3,000."""
MAX_VALUES = 20_000
"""Counted with aliases expanded: ten lines can expand to a billion values."""
MAX_DIGITS = 100
MAX_DEPTH = 50


def read_yaml(text: str) -> Any:
    """The values of a YAML document, which cannot contain Python objects.

    Raises:
        yaml.YAMLError: it is broken, or too large or too deep for a recipe.
        ValueError: a value is invalid, such as the date 2024-99-99.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"over {MAX_CHARACTERS:,} characters")
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that checks the depth and size of a document before it builds values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply for a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _size(node, {}, set()) > MAX_VALUES:
            raise yaml.YAMLError(f"expands to over {MAX_VALUES:,} values")
        return super().construct_document(node)


def _size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """The number of values below a node, with aliases expanded; over MAX_VALUES for a node that contains itself."""
    if id(node) in above:
        return MAX_VALUES + 1
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a whole number of over {MAX_DIGITS} characters")
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        above.add(id(node))
        known[id(node)] = 1 + sum(_size(part, known, above) for part in parts)
        above.remove(id(node))
    return known[id(node)]
