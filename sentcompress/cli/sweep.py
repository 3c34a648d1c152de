"""``sentcompress sweep``: a recipe run over a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli.common import RecipeArgument, console, examples, user_path


def sweep(
    recipe: RecipeArgument,
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="FIELD=VALUE,VALUE",
            help="A field of the recipe and the values to try, as YAML; repeatable: every combination is run. "
            "Commas inside [], {} or quotes do not separate values. Give a component and its options as one value, "
            "{name: attention, options: {latents: 4}}.",
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field of the recipe for all runs; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=user_path,
            help="Folder of the sweep, with a folder for each run.",
            show_default="out/RECIPE-sweep",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check all runs, print them with their token counts, and change nothing."
        ),
    ] = False,
) -> None:
    """Run a recipe for every combination of values and compare the runs.

    All runs are checked before the first one starts. A run that fails does not stop the others; the exit code is then
    1. Repeat the command to continue: it skips finished runs, resumes started ones and adds new ones. Writes
    the comparison to sweep.json, sweep.md (a table) and sweep.png (a plot).
    """
    from sentcompress.studies.grid import build_grid, parse_grid, sweep_plan
    from sentcompress.studies.sweep_runs import check_grid, run_sweep

    overrides = set_ or []
    axes = parse_grid(grid, overrides)
    points = build_grid(recipe, overrides, axes)
    title = points[0].recipe.name
    folder = out or Path("out") / f"{title.replace('/', '-')}-sweep"
    check_grid(points, folder)
    if dry_run:
        typer.echo(sweep_plan(points))
        return
    from sentcompress.errors import RunError
    from sentcompress.studies.sweep_report import render

    found = run_sweep(title, axes, points, folder, overrides=overrides)
    render(found, console())
    typer.echo(f"sweep: {folder / 'sweep.md'}")
    failed = [run.name for run in found.cells if run.state == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(found.cells)} runs failed: {', '.join(failed)}",
            fix=f"see {folder / failed[0] / 'log.txt'}; repeat the command to try them again",
        )


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress sweep parts --grid vae.conditioning=add,prefix --grid seed=0,1",
            "sentcompress sweep parts --grid 'fusion={name: mean},{name: attention, options: {latents: 4}}' "
            "--grid segmenter.options.preset=clause,sentence --dry-run",
        )
    )(sweep)
