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
    """Run every stage of a recipe in order and measure the result. A run that stopped is picked up."""
    resolved = resolve(recipe, set_, on_bad_line=on_bad_line)
    folder = execute(
        resolved, out, stages=None, resume=resume and not overwrite, overwrite=overwrite, dry_run=dry_run
    )
    if dry_run or resolved.pretrain is not None or not resolved.bench.metrics:
        return
    from sentcompress.benchmark.results import is_current, read_results
    from sentcompress.benchmark.runner import run_bench
    from sentcompress.cli.bench_common import show

    target = folder / "bench"
    if is_current(target, folder, resolved):
        typer.echo(f"bench: already done ({target})", err=True)
        show(read_results(target), target)
    else:
        show(run_bench(None, folder, resolved, target), target)


def add_to(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            "sentcompress run quickstart --out out/quickstart",
            "sentcompress run my-recipe.yaml --set graft.steps=100 --set seed=1",
            "sentcompress run paper/sllm-125m-h1 --dry-run",
        )
    )(run)
