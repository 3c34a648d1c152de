"""``sentcompress recipes``: lists the recipes that come with the package."""

from __future__ import annotations

import typer

from sentcompress.cli.common import console, examples
from sentcompress.errors import RecipeError


def recipes() -> None:
    """List the recipes that come with sentcompress."""
    from rich.table import Table
    from rich.text import Text

    from sentcompress.recipe import load_recipe, shipped_recipes

    table = Table("recipe", "description", box=None, pad_edge=False)
    for name in shipped_recipes():
        try:
            description = load_recipe(name).description
        except RecipeError as error:  # a damaged file must not hide the others
            description = f"broken: {error.message}"
        table.add_row(name, Text(description))
    console().print(table)


def add_to(app: typer.Typer) -> None:
    app.command(epilog=examples("sentcompress recipes", "sentcompress run quickstart --dry-run"))(recipes)
