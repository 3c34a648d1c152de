"""Reads untrusted YAML: plain values only, no duplicate keys, and no larger than a recipe can be."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**18
"""The longest shipped recipe has 3,000."""
MAX_VALUES = 20_000
"""Counted with aliases expanded: ten lines can expand to a billion values."""
MAX_DIGITS = 100
MAX_DEPTH = 50

_INT = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:e[-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*e[-+]?[0-9]+$|[-+]?\.inf$|\.nan$",
    re.IGNORECASE,
)


def read_yaml(text: str) -> Any:
    """The values of a YAML document, which cannot contain Python objects.

    Raises:
        yaml.YAMLError: it is broken, has a duplicate key, or is too large or too deep for a recipe.
        ValueError: a value is invalid, such as the date 2024-99-99.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"over {MAX_CHARACTERS:,} characters")
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that checks keys, depth and size of a document before it builds values.

    Numbers are those of YAML 1.2, as people write them: PyYAML reads ``1e-4`` as text, ``010`` as 8, ``1:30`` as 90.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            known = first.get((key.tag, key.value))
            first[key.tag, key.value] = key
            if known is not None:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key '{key.value}' on lines {known.start_mark.line + 1} and "
                    f"{key.start_mark.line + 1}",
                    problem_mark=key.start_mark,
                )
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        if _size(node, {}, set()) > MAX_VALUES:
            raise yaml.YAMLError(f"expands to over {MAX_VALUES:,} values")
        try:
            return super().construct_document(node)
        except (LookupError, AttributeError, TypeError) as error:  # PyYAML's own, for such as '!!bool maybe'
            raise ValueError(f"a value does not fit its tag: {error}") from None


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def describe_yaml_error(error: Exception) -> str:
    """What is wrong, for messages."""
    return getattr(error, "problem", None) or str(error)


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
