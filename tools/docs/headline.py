"""The README's headline table, read from the tables under docs/results: where we are ahead, level and behind."""

from __future__ import annotations

import re
from pathlib import Path

from sentcompress.table import as_markdown

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
EQUAL_COST = ("equal-cost.md", "Against a token-level model of equal cost")
SPEED = ("smollm2.md", "Speed, 96 prompt tokens and 96 new ones")
COLUMNS = ("figure", "sentence model", "same LLM, full size", "token-level, equal cost", "result")
LEVEL = 0.015
"""Single runs: a difference of less than this share is not a difference."""


def headline() -> str:
    """One row for speed, then one for each row of the equal-cost table."""
    return "\n".join(as_markdown(COLUMNS, [speed_row(), *map(quality_row, table(*EQUAL_COST))]))


def speed_row() -> list[str]:
    """Output tokens per second of SmolLM2 at batch 1."""
    full, ours = (row for row in table(*SPEED)[:2])
    speeds = [ours["output tokens/s"], full["output tokens/s"]]
    return ["tokens per second, SmolLM2-135M, batch 1", *speeds, "not timed", f"ahead, {ours['ratio']}"]


def quality_row(row: dict[str, str]) -> list[str]:
    """Bits per byte of one backbone at one budget."""
    ours, full, equal = (row[name] for name in ("sentence model", "full-size baseline", "its bits per byte"))
    name = f"bits per byte, {row['backbone']}, {row['tokens']} tokens"
    return [name, ours, full, equal, result(float(ours), float(full), float(equal))]


def result(ours: float, full: float, equal: float) -> str:
    """Ahead, level or behind, first beside the full size, then at equal cost; fewer bits are better."""
    beside_full, at_equal_cost = _compare(ours / full), _compare(ours / equal)
    if beside_full == at_equal_cost:
        return f"{beside_full} with both"
    return f"{beside_full}; {at_equal_cost} at equal cost"


def table(page: str, heading: str) -> list[dict[str, str]]:
    """The first table under a heading of a page, one dictionary per row.

    Raises:
        ValueError: the heading is missing, or a row has another number of table cells than the table has columns.
    """
    text = (RESULTS / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}$.*?(?=^## |\Z)", text, re.M | re.S)
    if section is None:
        raise ValueError(f"docs/results/{page} has no heading '## {heading}'")
    found = re.search(r"(?:^\|.*\n?)+", section[0], re.M)
    if found is None:
        raise ValueError(f"docs/results/{page} has no table under '## {heading}'")
    lines = found[0].splitlines()
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _compare(ratio: float) -> str:
    if abs(ratio - 1) < LEVEL:
        return "level"
    return "behind" if ratio > 1 else "ahead"
