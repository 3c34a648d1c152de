"""``--dry-run`` of a sweep: its cells and what they cost in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from sentcompress.estimate.plan import TOKENS_PER_SENTENCE, token_budget
from sentcompress.studies.grid import Cell


def plan(cells: Sequence[Cell]) -> str:
    """One block a cell, then the total."""
    lines, total = [], 0
    for number, cell in enumerate(cells, 1):
        tokens = token_budget(cell.recipe)
        total += sum(tokens.values())
        parts = ", ".join(f"{stage} {n:,}" for stage, n in tokens.items())
        lines.append(f"[{number}/{len(cells)}] {cell.name} ({cell.recipe.digest()})")
        lines += [f"    {override}" for override in cell.overrides]
        lines.append(f"    tokens: {parts}")
    lines.append(
        f"{len(cells)} cells, at most {total:,} tokens of training, at {TOKENS_PER_SENTENCE} per sentence "
        "(the corpus and the segmenter decide)"
    )
    lines.append("nothing was downloaded, built or written")
    return "\n".join(lines)
