"""Several results side by side. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sentcompress.benchmark.measurement import measurements
from sentcompress.benchmark.results import Results, read_results
from sentcompress.errors import InputError
from sentcompress.provenance import Record
from sentcompress.table import Figure, number


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
        InputError: fewer than two, or one that cannot be read.
    """
    if len(paths) < 2:
        raise InputError(
            "compare needs at least two results", fix="give two or more folders or results.json files"
        )
    results = [read_results(path) for path in paths]
    return [str(path) for path in paths], compare_results(results)


def compare_results(results: Sequence[Results]) -> list[ComparedRow]:
    """Rows in the order of the measurements, and in that in which the results first name their systems."""
    rows: dict[tuple[str, str, str], list[Figure]] = {}
    for measurement in measurements():
        for column, result in enumerate(results):
            for found in measurement.comparison(result):
                key = (measurement.name, found.system, found.figure)
                rows.setdefault(key, [None] * len(results))[column] = found.value
    return [ComparedRow(part=p, system=s, figure=f, values=values) for (p, s, f), values in rows.items()]


def warnings(results: Sequence[Results]) -> list[str]:
    """Why figures of these results may not be comparable."""
    found = setting_warnings(results)
    for measurement in measurements():
        found += measurement.warnings(results)
    return found


def setting_warnings(results: Sequence[Results]) -> list[str]:
    """How the machines and programs that measured them differ."""
    found = []
    for name in ("device", "dtype", "threads", "commit", "packages"):
        values = {str(getattr(row.honesty, name)) for result in results for row in result.rows}
        if len(values) > 1:
            found.append(f"the results differ in {name}: {'; '.join(sorted(values))}")
    return found


def render_comparison(names: Sequence[str], rows: Sequence[ComparedRow], console: Console) -> None:
    """Print the rows as one table."""
    table = Table("measurement", "system", "figure", box=None, pad_edge=False)
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
