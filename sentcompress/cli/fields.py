"""Describes the fields of a pydantic model in words: for ``plugins show`` and for docs/recipes.md."""

from __future__ import annotations

import json
import re
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class FieldRow(NamedTuple):
    """One line of a table of options."""

    name: str
    type: str
    default: str
    description: str


def describe_fields(model: type[BaseModel]) -> list[FieldRow]:
    """A row a field, in the order of the class."""
    return [
        FieldRow(name, type_text(info), default_text(info), plain(info.description or ""))
        for name, info in model.model_fields.items()
    ]


def type_text(info: FieldInfo) -> str:
    """The type and its limits, such as ``int, >= 1 | null``."""
    limits = [
        f"{sign} {getattr(limit, name)}"
        for limit in info.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([_annotation(info.annotation), *limits])


def default_text(info: FieldInfo) -> str:
    """The default as YAML would have it; ``required`` without one."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return json.dumps(changed) if changed else "defaults"
    if isinstance(value, tuple | set | frozenset):
        value = list(value)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def plain(docstring: str) -> str:
    """A docstring on one line, with Markdown's single backticks."""
    return re.sub(r"\s+", " ", docstring).replace("``", "`").strip()


def _annotation(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any"
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_annotation(a) for a in arguments)
    if origin is not None and arguments:
        if origin.__name__ == "Annotated":
            return _annotation(arguments[0])
        return f"{origin.__name__}[{', '.join(_annotation(a) for a in arguments if a is not Ellipsis)}]"
    return getattr(annotation, "__name__", str(annotation))
