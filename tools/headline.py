"""The README's headline table, read from the tables under docs/results."""

from __future__ import annotations

import re
from pathlib import Path

from sentcompress.table import as_markdown

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
PAGES = ("quality.md", "quickstart.md", "smollm2.md")
HEADING = "Against the equal-data twin"
COLUMNS = {
    "backbone": "backbone",
    "tokens": "trained on, tokens",
    "sentence model": "sentence model, bits a byte",
    "baseline": "its token-level twin",
    "ratio": "ratio",
    "decoding": "cost of a token: FLOPs, bytes",
}


def headline() -> str:
    """A row a backbone, that of the most tokens, linked to the page it stands on."""
    rows = []
    for page in PAGES:
        best: dict[str, dict[str, str]] = {}
        for row in table(page, HEADING):
            known = best.get(row["backbone"])
            if known is None or _tokens(row) > _tokens(known):
                best[row["backbone"]] = row
        for name, row in best.items():
            rows.append([f"[{name}](docs/results/{page})", *(row[column] for column in list(COLUMNS)[1:])])
    return "\n".join(as_markdown(list(COLUMNS.values()), rows))


def table(page: str, heading: str) -> list[dict[str, str]]:
    """The first table under a heading of a page, a dictionary a row.

    Raises:
        ValueError: the page has no such heading, or a row has not as many cells as the table columns.
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


def _tokens(row: dict[str, str]) -> int:
    return int(row["tokens"].replace(",", ""))
