"""``sentcompress watch``: the runs below a folder, as they go."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sentcompress.cli.common import console, examples
from sentcompress.io import printable

if TYPE_CHECKING:
    from rich.table import Table

    from sentcompress.training.watch import StageView

STYLES = {"training": "green", "done": "blue", "failed": "red", "lost": "red", "stopped": "yellow"}
CURVE = 24
"""Columns of the loss curve."""


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run, or of many runs.")],
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; so it does without a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once and print JSON.")] = False,
) -> None:
    """Show progress, loss, pace, time left and the last error of training runs; Ctrl-C ends it, not them.

    Reads files only (metrics.jsonl, heartbeat.json), so it works on another machine that sees the folder.
    """
    from sentcompress.errors import InputError
    from sentcompress.training import watch as runs

    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such folder", fix="give the --out of a run, or a folder of runs"
        )

    def look() -> list[StageView]:
        return [runs.view(stage, folder) for stage in runs.find_stages(folder)]

    stages = look()
    if as_json:
        print(runs.as_json(stages))
        return
    if not stages:
        raise InputError(
            f"{folder}: no run has written here yet", fix="give the --out of a run, or a folder of runs"
        )
    screen = console()
    if once or not sys.stdout.isatty():
        screen.print(table(stages))
        return
    import time

    from rich.live import Live

    with Live(table(stages), console=screen, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval)
                live.update(table(look()), refresh=True)
        except KeyboardInterrupt:
            return


def table(stages: list[StageView]) -> Table:
    """A row a stage."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from sentcompress.training.progress import duration
    from sentcompress.training.watch import curve

    shown = Table(box=box.SIMPLE_HEAD)
    for name in ("run", "state", "steps"):
        shown.add_column(name, no_wrap=True)
    for name in ("loss", "curve", "held out", "tokens/s", "left", "last sign"):
        shown.add_column(name, no_wrap=True, justify="left" if name == "curve" else "right")
    shown.add_column("trouble", overflow="fold")
    for stage in stages:
        share = f" {stage.step / stage.steps:.0%}" if stage.steps else ""
        cells: list[Any] = [
            stage.name,
            Text(stage.state, style=STYLES.get(stage.state, "")),
            f"{stage.step:,}/{stage.steps:,}{share}" if stage.steps else f"{stage.step:,}",
            f"{stage.losses[-1]:.4f}" if stage.losses else "",
            curve(stage.losses, CURVE),
            "{} {:.4g}".format(*stage.heldout) if stage.heldout else "",
            f"{stage.tokens_per_second:,.0f}" if stage.tokens_per_second is not None else "",
            duration(stage.seconds_left) if stage.seconds_left is not None else "",
            f"{duration(stage.age)} ago" if stage.age is not None else "",
            stage.error,
        ]
        # As Text, so that brackets in names are no markup; and as wide as it will be shown.
        shown.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells))
    return shown


def add_to(app: typer.Typer) -> None:
    app.command(
        "watch",
        epilog=examples(
            "sentcompress watch out/quickstart",
            "sentcompress watch out --interval 10",
            "sentcompress watch out/quickstart --json",
        ),
    )(watch)
