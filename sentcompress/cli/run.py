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
from sentcompress.cli.train import execute, resolve


def run(
    recipe: RecipeArgument,
    out: OutOption = None,
    set_: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Continue an unfinished run in the folder, or refuse to."),
    ] = True,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
    on_bad_line: Annotated[
        Literal["error", "skip"] | None,
        typer.Option(help="What to do at a broken line in a JSON-lines corpus: stop, or skip and count it."),
    ] = None,
) -> None:
    """Run every stage of a recipe in order and measure the result. An unfinished run is continued."""
    resolved = resolve(recipe, set_, on_bad_line=on_bad_line)
    folder = execute(
        resolved, out, stages=None, resume=resume and not overwrite, overwrite=overwrite, dry_run=dry_run
    )
    if dry_run:
        return
    from sentcompress.distributed import processes
    from sentcompress.pipeline import BENCH, stages_of

    if BENCH in stages_of(resolved) and processes().is_main_process:
        from sentcompress.benchmark.results import read_results
        from sentcompress.cli.bench_common import show

        show(read_results(folder / BENCH), folder / BENCH)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress run quickstart --out out/quickstart",
            "sentcompress run my-recipe.yaml --set graft.steps=100 --set seed=1",
            "sentcompress run paper/sllm-125m-h1 --dry-run",
        )
    )(run)
