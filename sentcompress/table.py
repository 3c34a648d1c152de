"""A table as text, and figures as its cells. No torch."""

from __future__ import annotations

from dataclasses import dataclass

Figure = float | int | str | bool | None


@dataclass
class Plain:
    """A table as text."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def number(value: Figure, digits: int = 3) -> str:
    """A figure as text; ``-`` for none."""
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
    return "-" if not isinstance(value, int | float) else f"{100 * value:.1f}%"
