"""``sentcompress validate``: checks a recipe."""

from __future__ import annotations

import typer

from sentcompress.cli.common import RecipeArgument, SetOption, examples
from sentcompress.cli.train import resolve


def validate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe: fields, components, options. Loads no data and no model."""
    resolved = resolve(recipe, set_)
    typer.echo(f"{recipe}: ok ({resolved.name}, digest {resolved.digest()})")


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress validate my-recipe.yaml",
            "sentcompress validate paper/vae-768-h1 --set train_vae.steps=100",
        )
    )(validate)
