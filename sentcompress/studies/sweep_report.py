"""A sweep as a table, a page and a picture: the same figures on the terminal, in ``sweep.md`` and ``sweep.png``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sentcompress.studies.presentation import (
    MARKERS,
    NEUTRAL,
    PALETTE,
    cycled,
    heading,
    legend_marker,
    require_matplotlib,
    save_png,
    section,
)
from sentcompress.studies.sweep_results import RunFigures, SweepResults, SweepRun
from sentcompress.table import Table, as_markdown, as_rich, number, percent

Column = tuple[str, Callable[[RunFigures], str]]
"""Its title, and what it shows of a run."""
BASELINE_RATIO = "ratio to baseline"
"""The opponents' columns follow this one."""
COLUMNS: list[Column] = [
    ("tokens per sentence", lambda f: number(f.mean_sentence_tokens, 1)),
    ("tokens right", lambda f: percent(f.token_accuracy)),
    ("sentences exact", lambda f: percent(f.exact_sentences)),
    ("forced perplexity", lambda f: number(f.forced_perplexity, 2)),
    ("bits/byte", lambda f: number(f.bits_per_byte, 4)),
    ("baseline", lambda f: number(f.baseline_bits_per_byte, 4)),
    (BASELINE_RATIO, lambda f: number(f.baseline_ratio, 4)),
    ("backbone as it came", lambda f: number(f.backbone_bits_per_byte, 4)),
    ("ratio to backbone", lambda f: number(f.backbone_ratio, 4)),
    ("output tok/s", lambda f: number(f.output_tokens_per_second, 1)),
    ("speed vs backbone", lambda f: f"{f.speed_ratio:.2f}x" if f.speed_ratio else "-"),
    ("training tokens", lambda f: number(f.training_tokens)),
    ("training s", lambda f: number(f.training_seconds, 0)),
    ("parameters", lambda f: f"{f.parameters / 1e6:.2f} M" if f.parameters else "-"),
]
PANELS: list[tuple[str, Callable[[RunFigures], float | None]]] = [
    ("reconstructed tokens, %", lambda f: None if f.token_accuracy is None else 100 * f.token_accuracy),
    # The ratio, not tokens/s: both were timed side by side, so the machine's load is the same in both.
    ("output speed over the backbone's own generate", lambda f: f.speed_ratio),
]


def sweep_table(sweep: SweepResults) -> Table:
    """One row for each run, best first; columns that no run has a figure for are left out."""
    runs = sweep.ranked()
    columns = ["#", *sweep.axes]
    rows = [[str(rank), *run.values] for rank, run in enumerate(runs, 1)]
    for title, show in _columns(runs):
        cells = [show(run.figures or RunFigures()) for run in runs]
        if any(cell != "-" for cell in cells):
            columns.append(title)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    if any(run.state != "done" for run in runs):
        columns.append("state")
        for row, run in zip(rows, runs, strict=True):
            row.append(run.state if run.state != "failed" else f"failed: {_one_line(run.error or '')}")
    return Table(f"{sweep.title}, best first by {sweep.order}", columns, rows)


def _columns(runs: list[SweepRun]) -> Iterator[Column]:
    """All columns; two for each opponent that some run has."""
    names = dict.fromkeys(name for run in runs if run.figures for name in run.figures.opponents)
    for column in COLUMNS:
        yield column
        if column[0] == BASELINE_RATIO:
            for name in names:
                yield f"opponent {name}", partial(_opponent_score, name)
                yield f"ratio to opponent {name}", partial(_opponent_ratio, name)


def _opponent_score(name: str, figures: RunFigures) -> str:
    return number(figures.opponents.get(name), 4)


def _opponent_ratio(name: str, figures: RunFigures) -> str:
    ours, theirs = figures.bits_per_byte, figures.opponents.get(name)
    return number(ours / theirs if ours and theirs else None, 4)


def render(sweep: SweepResults, console: Console) -> None:
    """Print the table and the notes."""
    # Titles of numeric columns break between words before a value of the grid does.
    console.print(as_rich(sweep_table(sweep), unbroken=range(1, 1 + len(sweep.axes))))
    for note in sweep.notes:
        console.print(Text(f"caution: {note}", style="dim"), soft_wrap=True)


def markdown(sweep: SweepResults) -> str:
    """The page: the command, the table, what to be careful about, and where each row comes from."""
    table = sweep_table(sweep)
    lines = heading(f"{sweep.title}: sweep", sweep.command)
    lines += [f"{sweep.created}. Best first, by {sweep.order}.", ""]
    lines += as_markdown(table.columns, table.rows)
    lines += [*(f"\nCaution: {note}." for note in sweep.notes), ""]
    lines += [
        "Bits per byte are the sentence model's on held-out documents, end marks and stop decisions included. Speed is "
        "that of the smallest batch measured, beside the backbone's own `generate`. Training counts the steps of the "
        "SentenceVAE and of the graft.",
        "",
    ]
    columns = [
        "#",
        "folder",
        "recipe hash",
        "commit",
        "device",
        "dtype",
        "threads",
        "seed",
        "training tokens",
    ]
    origins = [_origin(rank, run) for rank, run in enumerate(sweep.ranked(), 1)]
    return "\n".join([*lines, *section(Table("Where each row comes from", columns, origins))][:-1])


def _origin(rank: int, run: SweepRun) -> list[str]:
    h = run.honesty
    if h is None:
        return [str(rank), run.name, run.recipe_digest, *["-"] * 6]
    tokens = run.figures.training_tokens if run.figures else None
    origin = [h.commit, h.device, h.dtype, str(h.threads), str(h.seed), number(tokens)]
    return [str(rank), run.name, run.recipe_digest, *origin]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def draw(sweep: SweepResults, path: Path) -> bool:
    """Draw bits per byte against reconstruction and against speed; False where no run has figures to draw.

    Points have the color of their first field and the marker of their second; the number is the row of the table.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: the picture cannot be written.
    """
    require_matplotlib()
    runs = list(enumerate(sweep.ranked(), 1))
    wanted = [(title, points) for title, figure in PANELS if (points := _points(runs, figure))]
    if not wanted:
        return False

    def panels(figure: Any) -> None:
        axes = figure.subplots(1, len(wanted), squeeze=False)[0]
        for panel, (title, points) in zip(axes, wanted, strict=True):
            _scatter(panel, sweep, points)
            panel.set_xlabel(title)
            panel.set_ylabel("bits per byte (lower is better)")
        _legend(figure, sweep)

    save_png(path, (5.4 * len(wanted), 4.6), panels)
    return True


def _points(
    runs: list[tuple[int, SweepRun]], figure: Callable[[RunFigures], float | None]
) -> list[tuple[int, SweepRun, float, float]]:
    found = []
    for rank, run in runs:
        x = figure(run.figures) if run.figures else None
        if run.figures and x is not None and run.figures.bits_per_byte is not None:
            found.append((rank, run, x, run.figures.bits_per_byte))
    return found


def _scatter(axes: Any, sweep: SweepResults, points: list[tuple[int, SweepRun, float, float]]) -> None:
    for rank, run, x, y in points:
        color = cycled(PALETTE, _values(sweep, 0).index(run.values[0]))
        marker = cycled(MARKERS, _values(sweep, 1).index(run.values[1])) if len(run.values) > 1 else "o"
        axes.scatter([x], [y], color=color, marker=marker, s=46, linewidths=0, zorder=3)
        axes.annotate(
            str(rank), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8, color="#334155"
        )
    axes.margins(0.1)


def _values(sweep: SweepResults, axis: int) -> list[str]:
    return list(dict.fromkeys(run.values[axis] for run in sweep.cells))


def _legend(figure: Any, sweep: SweepResults) -> None:
    entries = [legend_marker("o", cycled(PALETTE, i), value) for i, value in enumerate(_values(sweep, 0))]
    if len(sweep.axes) > 1:
        entries += [
            legend_marker(cycled(MARKERS, i), NEUTRAL, value) for i, value in enumerate(_values(sweep, 1))
        ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)), fontsize=9)
