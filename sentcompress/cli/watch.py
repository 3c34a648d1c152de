"""``sentcompress watch``: the progress of the runs below a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentcompress.cli.common import console, examples, finite, user_path
from sentcompress.files import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from sentcompress.training.run_status import StageView

STYLES = {"training": "green", "done": "blue", "failed": "red", "lost": "red", "stopped": "yellow"}
COLUMNS = ("run", "state", "steps", "loss", "curve", "held out", "tokens/s", "left", "last seen", "error")
FIXED_COLUMNS = ("run", "state", "steps", "loss", "left")
OPTIONAL_COLUMNS = ("curve", "last seen", "tokens/s", "held out", "error")
"""Shown if the terminal is wide enough, in this order of priority. Otherwise errors are shown below the table."""
LEFT_ALIGNED = ("run", "state", "steps", "curve", "error")
CURVE_WIDTH = 24
ERROR_WIDTH = 40
"""Smallest width of the column of errors; narrower, they would wrap too often."""
MAX_ERROR = 1000
"""Characters of an error that are shown."""
NARROW_TERMINAL = 60
"""In a terminal with fewer columns every cell may wrap."""
SECONDS_PER_DAY = 86400
MAX_PLAIN_FIGURE = 1e9
"""Larger figures are shown with an exponent."""


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", parser=user_path, help="Folder of a run, or of many runs.")
    ],
    interval: Annotated[
        float, typer.Option(min=0.2, max=86400.0, callback=finite, help="Seconds between updates.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one snapshot and exit (default without a terminal).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON and exit.")] = False,
) -> None:
    """Show progress, loss, speed, time left and the last error of training runs. Ctrl-C does not stop the runs.

    Reads files only (metrics.jsonl, heartbeat.json), so it works on any machine that can read the folder.
    """
    from sentcompress.errors import InputError
    from sentcompress.training import run_status as runs

    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder", fix="give the --out folder of a run, or a folder of runs"
        )
    watcher = runs.Watcher(folder)
    if as_json:
        print(runs.as_json(watcher.look()))
        return
    screen = console()
    if once or not sys.stdout.isatty():
        stages = watcher.look()
        if not stages:
            raise InputError(
                f"{folder}: no runs here yet", fix="give the --out folder of a run, or a folder of runs"
            )
        screen.print(table(stages, screen))
        return
    import time

    from rich.live import Live

    with Live(console=screen, auto_refresh=False) as live:
        try:
            while True:
                stages = watcher.look()
                live.update(table(stages, screen) if stages else _nothing(folder, screen), refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def table(stages: list[StageView], screen: Console) -> RenderableType:
    """One row per stage, with as many columns as fit; below it the errors if they have no column."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(stage, screen) for stage in stages]

    def filled(names: list[str], **widest: int) -> Table:
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for name in names:
            shown.add_column(
                name,
                justify="left" if name in LEFT_ALIGNED else "right",
                overflow="fold",
                no_wrap=name not in ("run", "error") and screen.width >= NARROW_TERMINAL,
                max_width=widest.get(name),
            )
        for row in rows:
            shown.add_row(*(row[name] for name in names))
        return shown

    names = list(FIXED_COLUMNS)
    for name in OPTIONAL_COLUMNS:
        more = sorted([*names, name], key=COLUMNS.index)
        # A long name or error wraps before a column is dropped.
        draft = filled(more, run=screen.width // 3, error=ERROR_WIDTH)
        if screen.measure(draft, options=screen.options.update(width=sys.maxsize)).maximum <= screen.width:
            names = more
    below = [] if "error" in names else [row for row in rows if row["error"]]
    texts = [Text.assemble(row["run"], ": ", (row["error"].plain, "red"), overflow="fold") for row in below]
    return Group(filled(names), *([Text()] if texts else []), *texts)


def _cells(stage: StageView, screen: Console) -> dict[str, Text]:
    """The cells of a stage, by column."""
    from rich.text import Text

    from sentcompress.training.monitor import duration
    from sentcompress.training.run_status import ASCII_BARS, BARS, curve

    share = f" {stage.step / stage.steps:.0%}" if stage.steps else ""
    cells = {
        "run": stage.name,
        "state": stage.state,
        "steps": f"{stage.step:,}/{stage.steps:,}{share}" if stage.steps else f"{stage.step:,}",
        "loss": _figure(stage.loss, ".4f"),
        "curve": curve(stage.losses, CURVE_WIDTH, ASCII_BARS if screen.options.ascii_only else BARS),
        "held out": "{} {:.4g}".format(*stage.heldout) if stage.heldout else "",
        "tokens/s": _figure(stage.tokens_per_second, ",.0f"),
        "left": duration(stage.seconds_left) if stage.seconds_left is not None else "",
        "last seen": _since(stage.age),
        "error": stage.error[:MAX_ERROR],
    }
    # As Text, so that brackets in names are not markup, and in the characters that will be shown.
    shown = {name: Text(_line(cell, screen)) for name, cell in cells.items()}
    shown["state"].stylize(STYLES.get(stage.state, ""))
    return shown


def _figure(value: float | None, layout: str) -> str:
    if value is None:
        return ""
    return format(value, layout if abs(value) < MAX_PLAIN_FIGURE else ".4g")


def _since(age: float | None) -> str:
    from sentcompress.training.monitor import duration

    if age is None:
        return ""
    return f"{duration(age)} ago" if age < 2 * SECONDS_PER_DAY else f"{age // SECONDS_PER_DAY:,.0f} days ago"


def _line(text: str, screen: Console) -> str:
    """The text as a single line, in characters that the terminal can show."""
    encoding = screen.encoding
    return printable(text).replace("\n", "\\n").encode(encoding, "backslashreplace").decode(encoding)


def _nothing(folder: Path, screen: Console) -> Text:
    """A line in place of the table."""
    from rich.text import Text

    message = "no runs here yet" if os.path.isdir(folder) else "the folder is gone"
    return Text(_line(f"{folder}: {message}", screen), overflow="fold")


def add_to(app: typer.Typer) -> None:
    app.command(
        "watch",
        epilog=examples(
            "sentcompress watch out/quickstart",
            "sentcompress watch out --interval 10",
            "sentcompress watch out/quickstart --json",
        ),
    )(watch)
