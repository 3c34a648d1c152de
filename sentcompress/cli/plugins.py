"""``sentcompress plugins``: what is installed, what is broken, what options a component has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.cli.common import console, examples
from sentcompress.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sentcompress.registry import Plugin, Registry

plugins = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@plugins.callback()
def list_plugins(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, keyed by the name of the plugin's entry point.")
    ] = False,
) -> None:
    """List the components and who provides them.

    A broken plugin is shown with its error; it harms nothing but itself.
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
            fix="'sentcompress plugins' lists what is there",
        )
    for kind in kinds:
        component: Any = registry.get(kind, name)
        owner = registry.owner(kind, name)
        typer.echo(f"{kind} {name} ({owner.package} {owner.version})")
        typer.echo(_summary(component))
        _print_options(component.Options)


def _rivals(registry: Registry, plugin: Plugin, key: tuple[str, str]) -> list[str]:
    """Packages of the other plugins that claim the same name."""
    return [f"{p.package} ({p.name})" for p in registry.collisions().get(key, []) if p is not plugin]


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
                {"kind": kind, "name": name, "collides_with": _rivals(registry, plugin, (kind, name))}
                for kind, name in plugin.components
            ],
        }
    return listed


def _print_table(registry: Registry) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "package", "version", "status", box=None, pad_edge=False)
    for plugin in registry.plugins:
        for kind, name in plugin.components:
            rivals = _rivals(registry, plugin, (kind, name))
            status = f"collides with {', '.join(rivals)}" if rivals else plugin.status
            table.add_row(kind, Text(name), Text(plugin.package), Text(plugin.version), Text(status))
        if not plugin.components:
            status = f"broken: {plugin.error}" if plugin.error else "registers nothing"
            table.add_row(
                "plugin", Text(plugin.name), Text(plugin.package), Text(plugin.version), Text(status)
            )
    console().print(table)


def _summary(component: type) -> str:
    return (component.__doc__ or "").strip().partition("\n")[0] or "(no description)"


def _print_options(options: type[BaseModel]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sentcompress.cli.fields import describe_fields

    rows = describe_fields(options)
    if not rows:
        typer.echo("It has no options.")
        return
    table = Table("option", "type", "default", "what", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def add_to(app: typer.Typer) -> None:
    app.add_typer(
        plugins,
        name="plugins",
        epilog=examples(
            "sentcompress plugins", "sentcompress plugins --json", "sentcompress plugins show regex"
        ),
    )
