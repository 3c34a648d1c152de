"""``sentcompress watch``: the runs below a folder, as they go."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sentcompress.cli.common import console, examples
from sentcompress.files import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from sentcompress.training.run_status import StageView

STYLES = {"training": "green", "done": "blue", "failed": "red", "lost": "red", "stopped": "yellow"}
COLUMNS = ("run", "state", "steps", "loss", "curve", "held out", "tokens/s", "left", "last sign", "trouble")
ALWAYS = ("run", "state", "steps", "loss", "left")
WITH_ROOM = ("curve", "last sign", "tokens/s", "held out", "trouble")
"""Shown where the terminal is wide enough, the first ones first; trouble stands below the table otherwise."""
TO_THE_LEFT = ("run", "state", "steps", "curve", "trouble")
CURVE = 24
"""Columns of the loss curve."""
TROUBLE = 40
"""Columns below which a text would fold too often."""
LONGEST_TROUBLE = 1000
"""Characters of it that are shown."""
SMALL = 60
"""Columns of a terminal in which every cell may fold."""
DAY = 86400
LARGE = 1e9
"""Figures from here on are written with an exponent."""


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
    from sentcompress.training import run_status as runs

    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such folder", fix="give the --out of a run, or a folder of runs"
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
                f"{folder}: no run has written here yet", fix="give the --out of a run, or a folder of runs"
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
    """A row a stage, with as many columns as there is room for; below it the trouble that has no column."""
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
                justify="left" if name in TO_THE_LEFT else "right",
                overflow="fold",
                no_wrap=name not in ("run", "trouble") and screen.width >= SMALL,
                max_width=widest.get(name),
            )
        for row in rows:
            shown.add_row(*(row[name] for name in names))
        return shown

    names = list(ALWAYS)
    for name in WITH_ROOM:
        more = sorted([*names, name], key=COLUMNS.index)
        # A long name or text folds before another column goes.
        draft = filled(more, run=screen.width // 3, trouble=TROUBLE)
        if screen.measure(draft, options=screen.options.update(width=sys.maxsize)).maximum <= screen.width:
            names = more
    below = [] if "trouble" in names else [row for row in rows if row["trouble"]]
    texts = [Text.assemble(row["run"], ": ", (row["trouble"].plain, "red"), overflow="fold") for row in below]
    return Group(filled(names), *([Text()] if texts else []), *texts)


def _cells(stage: StageView, screen: Console) -> dict[str, Text]:
    """What is shown of a stage, by column."""
    from rich.text import Text

    from sentcompress.training.monitor import duration
    from sentcompress.training.run_status import ASCII_BARS, BARS, curve

    share = f" {stage.step / stage.steps:.0%}" if stage.steps else ""
    cells = {
        "run": stage.name,
        "state": stage.state,
        "steps": f"{stage.step:,}/{stage.steps:,}{share}" if stage.steps else f"{stage.step:,}",
        "loss": _figure(stage.loss, ".4f"),
        "curve": curve(stage.losses, CURVE, ASCII_BARS if screen.options.ascii_only else BARS),
        "held out": "{} {:.4g}".format(*stage.heldout) if stage.heldout else "",
        "tokens/s": _figure(stage.tokens_per_second, ",.0f"),
        "left": duration(stage.seconds_left) if stage.seconds_left is not None else "",
        "last sign": _since(stage.age),
        "trouble": stage.error[:LONGEST_TROUBLE],
    }
    # As Text, so that brackets in names are no markup; and as wide as it will be shown.
    shown = {name: Text(_line(cell, screen)) for name, cell in cells.items()}
    shown["state"].stylize(STYLES.get(stage.state, ""))
    return shown


def _figure(value: float | None, layout: str) -> str:
    if value is None:
        return ""
    return format(value, layout if abs(value) < LARGE else ".4g")


def _since(age: float | None) -> str:
    from sentcompress.training.monitor import duration

    if age is None:
        return ""
    return f"{duration(age)} ago" if age < 2 * DAY else f"{age // DAY:,.0f} days ago"


def _line(text: str, screen: Console) -> str:
    """What a terminal shows as one line, in characters that it has."""
    encoding = screen.encoding
    return printable(text).replace("\n", "\\n").encode(encoding, "backslashreplace").decode(encoding)


def _nothing(folder: Path, screen: Console) -> Text:
    """Instead of a table."""
    from rich.text import Text

    said = "no run has written here yet" if os.path.isdir(folder) else "the folder is gone"
    return Text(_line(f"{folder}: {said}", screen), overflow="fold")


def add_to(app: typer.Typer) -> None:
    app.command(
        "watch",
        epilog=examples(
            "sentcompress watch out/quickstart",
            "sentcompress watch out --interval 10",
            "sentcompress watch out/quickstart --json",
        ),
    )(watch)
