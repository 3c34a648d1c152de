"""YAML from a stranger: plain values only, of a size that a recipe can have."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 2**18
"""Characters of a recipe; the longest of ours has 3,000."""
MOST_VALUES = 20_000
"""Values it may stand for once its aliases are written out: ten lines can make a billion."""
LONGEST_NUMBER = 100
DEEPEST = 50
"""Levels."""


def read_yaml(text: str) -> Any:
    """Values of a YAML document; it cannot name Python objects.

    Raises:
        yaml.YAMLError: it is broken, or too large or too deep to be a recipe.
        ValueError: a value is none, such as the date 2024-99-99.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"over {LONGEST:,} characters")
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that looks at how deep and how large a document is before it makes anything of it."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("nested too deeply to be a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _size(node, {}, set()) > MOST_VALUES:
            raise yaml.YAMLError(f"stands for over {MOST_VALUES:,} values")
        return super().construct_document(node)


def _size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values below a node, with what aliases stand for counted each time; more than any for one inside itself."""
    if id(node) in above:
        return MOST_VALUES + 1
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > LONGEST_NUMBER:
            raise yaml.YAMLError(f"a whole number of over {LONGEST_NUMBER} characters")
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        above.add(id(node))
        known[id(node)] = 1 + sum(_size(part, known, above) for part in parts)
        above.remove(id(node))
    return known[id(node)]
