"""A sweep as a table: the same cells on the terminal and in ``sweep.md``. No torch."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sentcompress.studies.sweep_results import CellFigures, CellRow, SweepResults
from sentcompress.table import as_markdown, number, percent


def table_of(sweep: SweepResults) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows, best first; columns that no cell has anything for are left out."""
    rows = sweep.ranked()
    makers = [
        ("tokens a sentence", lambda f: number(f.mean_sentence_tokens, 1)),
        ("tokens right", lambda f: percent(f.token_accuracy)),
        ("sentences exact", lambda f: percent(f.exact_sentences)),
        ("forced perplexity", lambda f: number(f.forced_perplexity, 2)),
        ("bits/byte", lambda f: number(f.bits_per_byte, 4)),
        ("baseline", lambda f: number(f.baseline_bits_per_byte, 4)),
        ("ratio to it", lambda f: number(f.baseline_ratio, 4)),
        ("backbone as it came", lambda f: number(f.backbone_bits_per_byte, 4)),
        ("ratio to it", lambda f: number(f.backbone_ratio, 4)),
        ("output tok/s", lambda f: number(f.output_tokens_per_second, 1)),
        ("to generate", lambda f: f"{f.speed_ratio:.2f}x" if f.speed_ratio else "-"),
        ("training tokens", lambda f: number(f.training_tokens)),
        ("training s", lambda f: number(f.training_seconds, 0)),
        ("parameters", lambda f: f"{f.parameters / 1e6:.2f} M" if f.parameters else "-"),
    ]
    columns = ["#", *sweep.axes]
    body = [[str(place), *row.values] for place, row in enumerate(rows, 1)]
    for title, make in makers:
        made = [make(row.figures or CellFigures()) for row in rows]
        if any(cell != "-" for cell in made):
            columns.append(title)
            for line, cell in zip(body, made, strict=True):
                line.append(cell)
    if any(row.state != "done" for row in rows):
        columns.append("state")
        for line, row in zip(body, rows, strict=True):
            line.append(row.state if row.state != "failed" else f"failed: {_one_line(row.error or '')}")
    return columns, body


def render(sweep: SweepResults, console: Console) -> None:
    """Print the table and the notes."""
    columns, rows = table_of(sweep)
    fields = len(sweep.axes)
    title = f"{sweep.title}, best first by {sweep.order}"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        words = 1 <= index <= fields or column == "state"
        # What is numeric gives way first: its titles break between words.
        shown.add_column(
            Text(column), justify="left" if words else "right", overflow="fold", no_wrap=1 <= index <= fields
        )
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
    for note in sweep.notes:
        console.print(Text(f"careful: {note}", style="dim"), soft_wrap=True)


def markdown(sweep: SweepResults) -> str:
    """The table with what has to stand beside it: command, and where each row comes from."""
    columns, rows = table_of(sweep)
    ranked = sweep.ranked()
    lines = [f"# {sweep.title}: sweep", "", "```bash", sweep.command, "```", ""]
    lines += [f"{sweep.created}. Best first, by {sweep.order}.", ""]
    lines += as_markdown(columns, rows)
    lines += [*(f"\nCareful: {note}." for note in sweep.notes), ""]
    lines.append(
        "Bits per byte are the sentence model's on held-out documents, end marks and stop decisions included; "
        "speed is at the smallest batch measured, beside the backbone's own `generate`; training is the "
        "SentenceVAE's and the graft's steps."
    )
    lines += ["", "## Where each row comes from", ""]
    places = ["#", "folder", "recipe hash", "commit", "device", "dtype", "threads", "seed", "training tokens"]
    lines += as_markdown(places, [_origin(place, row) for place, row in enumerate(ranked, 1)])
    return "\n".join(lines) + "\n"


def _origin(place: int, row: CellRow) -> list[str]:
    h = row.honesty
    if h is None:
        return [str(place), row.name, row.recipe_digest, *["-"] * 6]
    tokens = row.figures.training_tokens if row.figures else None
    known = [h.commit, h.device, h.dtype, str(h.threads), str(h.seed), number(tokens)]
    return [str(place), row.name, row.recipe_digest, *known]


def _one_line(text: str) -> str:
    return " ".join(text.split())
