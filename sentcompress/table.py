"""Tables of text, shown on a terminal or as Markdown, and figures as the text of their cells. No torch."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group

Figure = float | int | str | bool | None
GIB = 2**30


@dataclass
class Table:
    """A table with its title and the notes below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def number(value: Figure, digits: int = 3) -> str:
    """A figure as text; ``-`` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    return str(value)


def percent(value: Figure) -> str:
    """A share as text, 0.5 as ``50.0%``."""
    return "-" if not isinstance(value, int | float) else f"{100 * value:.1f}%"


def byte_size(value: Figure) -> str:
    """A number of bytes as text, with the unit that suits it; ``-`` for None."""
    if not isinstance(value, int | float):
        return "-"
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def gib(size: float) -> str:
    """Bytes as a number of GiB, without the unit."""
    return f"{size / GIB:.2f}"


def as_rich(table: Table, unbroken: Container[int] = ()) -> Group:
    """A table with its notes for the terminal; columns of numbers are aligned to the right.

    Args:
        unbroken: indices of columns that are not broken into several lines.
    """
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        numeric = all(row[index].lstrip("-")[:1].isdigit() or row[index] in ("-", "") for row in table.rows)
        shown.add_column(
            Text(column),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=index in unbroken,
        )
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return Group(shown, *(Text(note, style="dim") for note in table.notes), Text(""))


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)]
