"""What the subcommands of ``bench`` share: measuring parts of a folder, and showing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentcompress.cli.common import console

if TYPE_CHECKING:
    from sentcompress.benchmark.records import Results

FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Folder of a run (out/quickstart) or of a model (out/quickstart/graft)."
    ),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Where results go.", show_default="bench in the folder"),
]


def measure(
    parts: list[str] | None,
    folder: Path,
    out: Path | None,
    overrides: list[str] | None,
    by: list[str] | None = None,
    judge: str | None = None,
) -> Results:
    from sentcompress.benchmark.models import Folder
    from sentcompress.benchmark.runner import run_bench

    place = Folder(folder)
    target = out or place.path / "bench"
    results = run_bench(parts, place, place.recipe(overrides), target, by=by, judge=judge)
    show(results, target, parts)
    return results


def show(results: Results, target: Path, parts: list[str] | None = None) -> None:
    """Print the tables (of the parts just measured) and where the report is, in the first of several processes."""
    from sentcompress.benchmark.tables import render
    from sentcompress.distributed import processes

    if not processes().is_main_process:
        return

    if parts is not None:
        kept = [row for row in results.rows if row.part in parts]
        skipped = [entry for entry in results.skipped if entry.part in parts]
        results = results.model_copy(update={"rows": kept, "skipped": skipped})
    render(results, console())
    typer.echo(f"report: {target / 'report.html'}")
