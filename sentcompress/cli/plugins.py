"""``sentcompress plugins``: what is installed, what is broken, what options a component has; a new one."""

from __future__ import annotations

import ast
import inspect
import json
import shlex
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.cli.common import console, examples, user_path
from sentcompress.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sentcompress.registry import Plugin, Registry

plugins = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@plugins.callback()
def list_plugins(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the names of entry points as keys.")
    ] = False,
) -> None:
    """List all components and the packages that provide them.

    A broken plugin is listed with its error and does not affect the others.
    """
    if context.invoked_subcommand:
        return
    from sentcompress.registry import get_registry

    registry = get_registry()
    if as_json:
        typer.echo(json.dumps(_as_dict(registry), indent=2, ensure_ascii=False))
    else:
        _print_table(registry)


@plugins.command(
    "show", epilog=examples("sentcompress plugins show regex", "sentcompress plugins show jsonl")
)
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a component.")]) -> None:
    """Show a component's options."""
    from sentcompress.registry import KINDS, get_registry

    registry = get_registry()
    kinds = [kind for kind in KINDS if name in registry.names(kind)]
    if not kinds:
        known = {n for kind in KINDS for n in registry.names(kind)}
        broken = "".join(f"\n  plugin '{p.name}' is broken: {p.error}" for p in registry.broken())
        raise PluginError(
            f"no component is called '{name}'.{did_you_mean(name, known)}{broken}",
            fix="'sentcompress plugins' lists all components",
        )
    for kind in kinds:
        component: Any = registry.get(kind, name)
        owner = registry.owner(kind, name)
        typer.echo(f"{kind} {name} ({owner.package} {owner.version})")
        typer.echo(summary(component) or "(no description)")
        _print_options(component.Options)


@plugins.command(
    "new",
    epilog=examples(
        "sentcompress plugins new verses --kind segmenter",
        "sentcompress plugins new max-pool --kind fusion --out ~/src/max-pool",
        "sentcompress plugins new olmo --kind backbone",
    ),
)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the component in recipes.")],
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="One of segmenter, fusion, backbone, dataset, metric, memory.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=user_path, help="New or empty folder to write to.", show_default="sentcompress-NAME"
        ),
    ] = None,
) -> None:
    """Write a package with a small working component for you to change.

    You can install it with pip and run its tests; 'sentcompress plugins' lists it.
    """
    from sentcompress.cli import scaffold
    from sentcompress.registry import get_registry

    planned = scaffold.plan(name, kind, get_registry())
    folder = out or Path(planned.package)
    scaffold.write(planned, folder)
    typer.echo(f"{folder}: the {kind} '{planned.name}' in {len(planned.files)} files. Next:\n")
    typer.echo(f"  pip install -e {shlex.quote(f'{folder}[test]')}")
    typer.echo(f"  pytest {shlex.quote(str(folder))}")
    typer.echo(f"  {planned.command}")


def _rivals(registry: Registry, plugin: Plugin, key: tuple[str, str]) -> list[str]:
    """Packages of other plugins that claim the same name."""
    return [f"{p.package} ({p.name})" for p in registry.collisions().get(key, []) if p is not plugin]


def _help(registry: Registry, plugin: Plugin, key: tuple[str, str]) -> str:
    return next((summary(c.target) for c in registry.claims(*key) if c.plugin is plugin), "")


def _as_dict(registry: Registry) -> dict[str, dict[str, Any]]:
    listed: dict[str, dict[str, Any]] = {}
    for plugin in registry.plugins:
        # Entry-point names are unique only within a package.
        key = plugin.name if plugin.name not in listed else f"{plugin.name} ({plugin.package})"
        listed[key] = {
            "package": plugin.package,
            "version": plugin.version,
            "module": plugin.module,
            "status": plugin.status,
            "error": plugin.error,
            "components": [
                {
                    "kind": kind,
                    "name": name,
                    "help": _help(registry, plugin, (kind, name)),
                    "collides_with": _rivals(registry, plugin, (kind, name)),
                }
                for kind, name in plugin.components
            ],
        }
    return listed


def _print_table(registry: Registry) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "package", "version", "status", "what", box=None, pad_edge=False)

    def add(*cells: str) -> None:
        table.add_row(*(Text(cell) for cell in cells))

    for plugin in registry.plugins:
        for kind, name in plugin.components:
            rivals = _rivals(registry, plugin, (kind, name))
            status = f"collides with {', '.join(rivals)}" if rivals else plugin.status
            what = _help(registry, plugin, (kind, name))
            add(kind, name, plugin.package, plugin.version, status, what)
        if not plugin.components:
            status = f"broken: {plugin.error}" if plugin.error else "registers nothing"
            add("plugin", plugin.name, plugin.package, plugin.version, status, "")
    console().print(table)


def _print_options(options: type[BaseModel]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sentcompress.cli.options import describe_fields

    rows = describe_fields(options)
    if not rows:
        typer.echo("It has no options.")
        return
    table = Table("option", "type", "default", "what", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def summary(target: type | str) -> str:
    """First line of the docstring of a class or of ``"module:Class"``; empty if there is none.

    A class that is not imported yet stays so.
    """
    if isinstance(target, str):
        module, _, name = target.partition(":")
        text = _docstrings(module).get(name)
    else:
        text = target.__dict__.get("__doc__")  # its own, not the one it inherits from the contract
    return inspect.cleandoc(text).partition("\n")[0].replace("``", "`") if isinstance(text, str) else ""


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Docstrings of a module's classes by name, read from its source: importing it might import torch."""
    try:
        tree = ast.parse(_source(module) or "")
    except Exception:  # the file of a plugin may hold anything; a line of help is not worth an error
        return {}
    return {node.name: ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _source(module: str) -> str | None:
    """Walk the parent packages one by one: ``find_spec`` on the whole name would import them."""
    parts = module.split(".")
    spec: Any = find_spec(parts[0])
    for end in range(2, len(parts) + 1):
        if spec is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:end]), spec.submodule_search_locations)
    return spec.loader.get_source(module) if spec else None


def add_to(app: typer.Typer) -> None:
    app.add_typer(
        plugins,
        name="plugins",
        epilog=examples(
            "sentcompress plugins",
            "sentcompress plugins --json",
            "sentcompress plugins show regex",
            "sentcompress plugins new verses --kind segmenter",
        ),
    )
