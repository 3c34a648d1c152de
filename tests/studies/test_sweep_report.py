"""Order, table, page and picture of a sweep, from figures made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sentcompress.benchmark.measurements.quality import DocumentScore, Quality, QualityScore
from sentcompress.benchmark.results import Results, write_results
from sentcompress.studies.sweep_report import draw, markdown, render, sweep_table
from sentcompress.studies.sweep_results import (
    RunFigures,
    SweepResults,
    SweepRun,
    comparison_notes,
    read_figures,
)


def row(name: str, *, state: str = "done", error: str | None = None, **figures: Any) -> SweepRun:
    return SweepRun(
        name=name,
        values=[name],
        overrides=[f"seed={name}"],
        recipe_digest="0" * 12,
        state=state,
        error=error,
        figures=RunFigures(**figures) if figures else None,
    )


def sweep(*rows: SweepRun, notes: tuple[str, ...] = ()) -> SweepResults:
    values = [row.name for row in rows]
    return SweepResults(
        title="t",
        command="c",
        created="now",
        overrides=[],
        axes={"seed": values},
        cells=list(rows),
        notes=list(notes),
    )


def names(found: SweepResults) -> str:
    return "".join(row.name for row in found.ranked())


def test_best_first_and_what_is_missing_last():
    a, b = row("a", bits_per_byte=2.0), row("b", bits_per_byte=1.0)
    assert names(sweep(row("x", state="failed", error="no"), a, row("w", state="waiting"), b)) == "baxw"
    assert names(sweep()) == ""


def test_ratio_to_the_baseline_decides_where_all_have_one():
    a = row("a", bits_per_byte=2.0, baseline_ratio=1.1)
    b = row("b", bits_per_byte=1.0, baseline_ratio=1.2)
    assert names(sweep(b, a)) == "ab"
    assert names(sweep(row("c", bits_per_byte=1.5), b, a)) == "bca"


def shown(found: SweepResults) -> tuple[list[str], list[list[str]]]:
    table = sweep_table(found)
    return table.columns, table.rows


def test_columns_that_nobody_has_are_left_out():
    columns, lines = shown(sweep(row("a", bits_per_byte=2.0), row("b", bits_per_byte=1.0, parameters=2.5e6)))
    assert columns == ["#", "seed", "bits/byte", "parameters"]
    assert lines == [["1", "b", "1.0000", "2.50 M"], ["2", "a", "2.0000", "-"]]
    columns, lines = shown(sweep(row("a", state="failed", error="one\ntwo"), row("b", state="waiting")))
    assert columns == ["#", "seed", "state"]
    assert [line[-1] for line in lines] == ["failed: one two", "waiting"]


def test_every_figure_has_a_column():
    figures = dict.fromkeys(RunFigures.model_fields, 1) | {"opponents": {"small": 2}}
    columns, lines = shown(sweep(row("a", **figures)))
    unshown = {"batch_size"}  # said in the text below the table
    computed = {"ratio to opponent small"}
    assert len(columns) == 2 + len(figures) - len(unshown) + len(computed)
    assert "-" not in lines[0]


def test_opponents_stand_behind_the_baseline():
    a = row("a", bits_per_byte=3.0, baseline_bits_per_byte=1.5, baseline_ratio=2.0, opponents={"x": 2.0})
    b = row("b", bits_per_byte=2.0, baseline_bits_per_byte=1.0, baseline_ratio=2.0)
    columns, lines = shown(sweep(a, b))
    quality = ["bits/byte", "baseline", "ratio to baseline", "opponent x", "ratio to opponent x"]
    assert columns == ["#", "seed", *quality]
    assert [line[2:] for line in lines] == [
        ["3.0000", "1.5000", "2.0000", "2.0000", "1.5000"],
        ["2.0000", "1.0000", "2.0000", "-", "-"],
    ]


def test_the_page_keeps_its_columns_whatever_a_value_holds(capsys):
    found = sweep(row("a|b", bits_per_byte=1.0), notes=("they differ in commit: x; y",))
    page = markdown(found)
    assert "| 1 | a\\|b | 1.0000 |" in page
    assert "Caution: they differ in commit: x; y." in page
    assert f"| 1 | a\\|b | {'0' * 12} | - |" in page
    render(found, Console(width=120))
    printed = capsys.readouterr().out
    assert "a|b" in printed
    assert "caution: they differ in commit" in printed


def scored(sizes: tuple[int, ...]) -> Results:
    documents = [
        DocumentScore(
            document=i, source=str(i), bytes=n, covered_bytes=n, nats=1, targets=1, baseline_tokens=1
        )
        for i, n in enumerate(sizes)
    ]
    score = QualityScore(
        system="sentence model",
        bits_per_byte=1,
        perplexity=1,
        nats=1,
        bytes=sum(sizes),
        targets=1,
        baseline_tokens=1,
        context="",
        documents=documents,
    )
    return Results(title="t", created="now", quality=[score])


def test_other_bytes_are_said():
    a, b = row("a", backbone_bits_per_byte=1.5), row("b", backbone_bits_per_byte=1.25)
    assert comparison_notes([(a, scored((700, 300))), (b, scored((700, 300)))]) == []
    (note,) = comparison_notes([(a, scored((700, 300))), (b, scored((1000, 500)))])
    assert "not scored on the same bytes (1,000 to 1,500)" in note
    assert note.endswith("the backbone as it came has 1.2500 to 1.5000")
    # The same sum is not the same text.
    (note,) = comparison_notes([(row("a"), scored((700, 300))), (row("b"), scored((300, 700)))])
    assert note.endswith("rather than bits per byte")


def with_opponent(share: float) -> Results:
    found = scored((700, 300))
    ours = Quality.of(found)[0]
    theirs = {"system": "opponent x", "bits_per_byte": 1.25, "cost_share": share}
    Quality.put(found, [ours, ours.model_copy(update=theirs)])
    return found


def test_opponents_are_read_from_a_runs_results(tmp_path: Path):
    write_results(with_opponent(1.0), tmp_path / "bench")
    figures, _ = read_figures(tmp_path)
    assert figures.opponents == {"x": 1.25}
    write_results(scored((700, 300)), tmp_path / "bench")
    assert read_figures(tmp_path)[0].opponents == {}


def test_an_opponent_of_another_cost_is_said():
    equal, other = with_opponent(1.05), with_opponent(1.5)
    assert comparison_notes([(row("a"), equal), (row("b"), equal)]) == []
    (note,) = comparison_notes([(row("a"), equal), (row("b"), other)])
    assert note == "opponent x is not of equal cost: 1.05 to 1.50 times the sentence model's"


@pytest.mark.parametrize("points", [0, 1, 9])
def test_the_picture_is_drawn_when_there_are_points(tmp_path, points: int):
    rows = [row(str(i), bits_per_byte=1 + i, token_accuracy=0.5) for i in range(points)]
    path = tmp_path / "sweep.png"
    assert draw(sweep(*rows, row("x", state="failed", error="no")), path) is (points > 0)
    assert path.is_file() is (points > 0)
