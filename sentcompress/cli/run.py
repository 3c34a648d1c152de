"""``sentcompress run``: every stage of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from sentcompress.cli.common import (
    DryRunOption,
    OutOption,
    OverwriteOption,
    RecipeArgument,
    SetOption,
    examples,
)
from sentcompress.cli.experiment import execute, resolve


def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Pick up where the folder's run stopped, or refuse if it holds one."
        ),
    ] = True,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    on_bad_line: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="A broken line of a JSON-lines corpus: stop there, or skip and count it."),
    ] = None,
) -> None:
    """Run every stage of a recipe in order. A run that stopped is picked up."""
    resolved = resolve(recipe, set_, on_bad_line=on_bad_line)
    execute(resolved, out, stages=None, resume=resume and not overwrite, overwrite=overwrite, dry_run=dry_run)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress run quickstart --out out/quickstart",
            "sentcompress run my-recipe.yaml --set graft.steps=100 --set seed=1",
            "sentcompress run paper/sllm-125m-h1 --dry-run",
        )
    )(run)
