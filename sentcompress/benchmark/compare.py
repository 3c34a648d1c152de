"""Several results side by side. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sentcompress.benchmark.records import Results
from sentcompress.benchmark.results import read_results
from sentcompress.errors import InputError
from sentcompress.provenance import Record
from sentcompress.table import Figure, number

SHOWN = {
    "quality": ("bits_per_byte", "perplexity", "bytes"),
    "text": ("judge_bits_per_byte", "repeated_4_grams", "loops", "distinct_2", "words"),
    "reconstruct": ("token_accuracy", "exact_sentences", "teacher_forced_perplexity"),
    "speed": (
        "prefill_tokens_per_second",
        "first_token_ms",
        "output_tokens_per_second",
        "ratio",
        "total_ratio",
    ),
    "memory": ("cache_bytes_per_token", "peak_slope_bytes_per_token", "longest_context_tokens"),
    "data": ("heldout_mean_sentence_tokens", "cutting_overhead"),
}


class ComparedRow(Record):
    """One figure of one system in every result; None where a result does not have it."""

    part: str
    system: str
    figure: str
    values: list[Figure]


def compare(paths: Sequence[Path]) -> tuple[list[str], list[ComparedRow]]:
    """Put results side by side.

    Args:
        paths: ``results.json`` files, or folders with one.

    Returns:
        a name for each result, and the rows.

    Raises:
        InputError: fewer than two, or one cannot be read.
    """
    if len(paths) < 2:
        raise InputError(
            "compare needs at least two results", fix="give two or more folders or results.json files"
        )
    results = [read_results(path) for path in paths]
    return [str(path) for path in paths], compare_results(results)


def compare_results(results: Sequence[Results]) -> list[ComparedRow]:
    """Rows in the order in which the results first name them."""
    cells: dict[tuple[str, str, str], list[Figure]] = {}
    for column, result in enumerate(results):
        figures: list[tuple[tuple[str, str, str], Figure]] = []
        checks = result.causality.checks if result.causality else []
        if checks:
            worst = max(check.max_delta for check in checks if check.kind == "future")
            figures.append((("causality", "all checks", "future max_delta"), worst))
            figures.append((("causality", "all checks", "passed"), all(check.passed for check in checks)))
        for row in result.rows:
            batch = f", batch {row.figures['batch_size']}" if row.part == "speed" else ""
            figures += [
                ((row.part, row.system + batch, name), row.figures.get(name))
                for name in SHOWN.get(row.part, ())
            ]
        for key, value in figures:
            cells.setdefault(key, [None] * len(results))[column] = value
    return [ComparedRow(part=p, system=s, figure=f, values=values) for (p, s, f), values in cells.items()]


def warnings(results: Sequence[Results]) -> list[str]:
    """Why figures of these results may not be comparable."""
    found = setting_warnings(results)
    texts = {tuple((d.source, d.bytes) for d in r.quality[0].documents) for r in results if r.quality}
    if len(texts) > 1:
        found.append(
            "they were scored on different held-out text: bits per byte and perplexity cannot be compared"
        )
    if len({tuple(r.text.prompts) for r in results if r.text}) > 1:
        found.append("their models continued different prompts: figures of the text cannot be compared")
    judges = {r.text.judge or "none" for r in results if r.text}
    if len(judges) > 1:
        found.append(f"their text was scored by different judges: {', '.join(sorted(judges))}")
    return found


def setting_warnings(results: Sequence[Results]) -> list[str]:
    """In what their machines and programs differ."""
    found = []
    for name in ("device", "dtype", "threads", "commit", "packages"):
        values = {str(getattr(row.honesty, name)) for result in results for row in result.rows}
        if len(values) > 1:
            found.append(f"they differ in {name}: {'; '.join(sorted(values))}")
    return found


def render_comparison(names: Sequence[str], rows: Sequence[ComparedRow], console: Console) -> None:
    """Print the rows as one table."""
    table = Table("part", "system", "figure", box=None, pad_edge=False)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in rows:
        table.add_row(
            row.part,
            Text(row.system),
            row.figure.replace("_", " "),
            *(number(value, 4) for value in row.values),
        )
    console.print(table)
