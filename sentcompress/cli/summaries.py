"""One line of help for a component, from its docstring; a class that is not imported yet stays so."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any


def summary(target: type | str) -> str:
    """First line of the docstring of a class, or of ``"module:Class"``; empty where there is none to be found."""
    if isinstance(target, str):
        module, _, name = target.partition(":")
        text = _docstrings(module).get(name)
    else:
        text = target.__dict__.get("__doc__")  # its own: the contract's says nothing about it
    return inspect.cleandoc(text).partition("\n")[0].replace("``", "`") if isinstance(text, str) else ""


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Docstrings of a module's classes by name, read from its source: importing it might import torch."""
    try:
        tree = ast.parse(_source(module) or "")
    except Exception:  # a stranger's file may hold anything; the line of help is not worth an error
        return {}
    return {node.name: ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _source(module: str) -> str | None:
    """``find_spec`` would import the packages around the module, so they are walked one by one."""
    parts = module.split(".")
    spec: Any = find_spec(parts[0])
    for end in range(2, len(parts) + 1):
        if spec is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:end]), spec.submodule_search_locations)
    return spec.loader.get_source(module) if spec else None
