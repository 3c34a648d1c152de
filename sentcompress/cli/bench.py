"""``sentcompress bench``: one subcommand a measurement."""

from __future__ import annotations

from typing import Annotated

import typer

from sentcompress.cli.common import console, examples

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@bench.callback()
def options() -> None:
    """Measure models and parts."""


@bench.command(
    "segments",
    epilog=examples("sentcompress bench segments", "sentcompress bench segments --markdown > segments.md"),
)
def segments(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Score the segmenters on the labelled hard cases."""
    from sentcompress.benchmark.segments import render_markdown, score_segmenters

    scores = score_segmenters()
    if markdown:
        typer.echo(render_markdown(scores))
        return
    from rich.markdown import Markdown

    console().print(Markdown(render_markdown(scores)))


def add_to(app: typer.Typer) -> None:
    app.add_typer(bench, name="bench", epilog=examples("sentcompress bench segments"))
