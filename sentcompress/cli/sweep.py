"""``sentcompress sweep``: a recipe run over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli.common import RecipeArgument, console, examples


def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="FIELD=VALUE,VALUE",
            help="A field of the recipe and the values to try, as YAML; repeatable: every combination is run. "
            "Commas within [], {} or quotes do not split. A component and its options go together as "
            "{name: attention, options: {latents: 4}}.",
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field of the recipe for all cells; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the sweep, with a folder a cell.",
            show_default="out/, the recipe's name and -sweep",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all cells, print them and their tokens, touch nothing.")
    ] = False,
) -> None:
    """Run a recipe over a grid of values and compare: one run a cell, one table and a plot at the end.

    Every cell is checked before the first one starts. A cell that fails does not stop the others (the code is then
    1). The same command again skips finished cells, goes on with started ones and adds new ones. Writes sweep.json,
    sweep.md and sweep.png.
    """
    from sentcompress.studies.grid import build_cells, parse_grid
    from sentcompress.studies.sweep_runner import check_cells, run_sweep

    overrides = set_ or []
    axes = parse_grid(grid, overrides)
    cells = build_cells(recipe, overrides, axes)
    title = cells[0].recipe.name
    folder = out or Path("out") / f"{title.replace('/', '-')}-sweep"
    check_cells(cells, folder)
    if dry_run:
        from sentcompress.studies.sweep_plan import plan

        typer.echo(plan(cells))
        return
    from sentcompress.errors import RunError
    from sentcompress.studies.sweep_tables import render

    found = run_sweep(title, axes, cells, folder, overrides=overrides)
    render(found, console())
    typer.echo(f"sweep: {folder / 'sweep.md'}")
    failed = [row.name for row in found.cells if row.state == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(found.cells)} cells failed: {', '.join(failed)}",
            fix=f"see {folder / failed[0] / 'log.txt'}; the same command again tries them again",
        )


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress sweep parts --grid vae.conditioning=add,prefix --grid seed=0,1",
            "sentcompress sweep parts --grid 'fusion={name: mean},{name: attention, options: {latents: 4}}' "
            "--grid segmenter.options.preset=clause,sentence --dry-run",
        )
    )(sweep)
