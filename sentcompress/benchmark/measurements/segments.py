"""How well segmenters cut hard cases that were labeled by hand (``segment_cases.yaml``). No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.contracts import Segmenter
from sentcompress.registry import get_registry
from sentcompress.table import Table, number, percent

if TYPE_CHECKING:
    from rich.console import Console

    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench

LABELS = ("sentence", "clause", "paper")


class Segments(Measurement[None]):
    """Score the presets of the regex segmenter on the labelled hard cases."""

    title = "Segmenters on labelled hard cases"
    order = 80
    reads_corpus = False
    one_line = True
    examples = (
        "sentcompress bench segments",
        "sentcompress bench segments --markdown > segments.md",
    )

    def measure(self, bench: Bench) -> None:
        for scored in score_segmenters(regex_presets()):
            figures = {
                k: v for k, v in scored.items() if isinstance(v, int | float | str) and k != "segmenter"
            }
            bench.row(self.name, scored["segmenter"], figures)

    def sections(self, results: Results) -> list[Section]:
        lines = [
            [
                row.system,
                number(row.figures["cases"]),
                number(row.figures["right"]),
                percent(row.figures["share"]),
            ]
            for row in results.rows_of(self.name)
        ]
        return [Section(Table(self.title, ["segmenter", "cases", "right", "share"], lines))]

    def command(self, console: Callable[[], Console]) -> Callable[..., None]:
        # No model takes part in it, so its command has no folder.
        def segments(
            markdown: Annotated[
                bool, typer.Option("--markdown", help="Print the table as Markdown.")
            ] = False,
        ) -> None:
            from rich.markdown import Markdown

            text = render_markdown(score_segmenters(regex_presets()))
            if markdown:
                typer.echo(text)
            else:
                console().print(Markdown(text))

        return segments


@cache
def load_cases() -> tuple[dict[str, Any], ...]:
    """Return the cases, each with ``id``, ``group``, ``text`` and the pieces of every label it has."""
    source = resources.files("sentcompress.benchmark.measurements").joinpath("segment_cases.yaml")
    cases = yaml.safe_load(source.read_text(encoding="utf-8"))
    for case in cases:
        if case["clause"] == "same":
            case["clause"] = case["sentence"]
        case["text"] = "".join(case["sentence"])
    return tuple(cases)


def regex_presets() -> dict[str, Segmenter]:
    """The built-in segmenter under each of its presets, by a name for the table."""
    registry = get_registry()
    return {f"regex, {name}": registry.create("segmenter", "regex", {"preset": name}) for name in LABELS}


def score_segmenters(specs: Mapping[str, Segmenter]) -> list[dict[str, Any]]:
    """Return one row per segmenter, scored against the label of its preset.

    ``right`` counts the cases cut exactly as labelled. Precision, recall and F1 count the positions inside
    the texts where a cut was made or wanted.
    """
    return [_score(name, segmenter) for name, segmenter in specs.items()]


def _score(name: str, segmenter: Segmenter) -> dict[str, Any]:
    preset = getattr(segmenter.options, "preset", None)
    label = preset if preset in LABELS else "sentence"
    groups: dict[str, list[bool]] = {}
    hits = made = wanted = 0
    for case in load_cases():
        if label not in case:
            continue
        got, want = segmenter.split(case["text"]), case[label]
        groups.setdefault(case["group"], []).append(got == want)
        places, right_places = _places(got), _places(want)
        hits += len(places & right_places)
        made += len(places)
        wanted += len(right_places)
    marks = [mark for marks in groups.values() for mark in marks]
    precision, recall = _share(hits, made), _share(hits, wanted)
    return {
        "segmenter": name,
        "label": label,
        "cases": len(marks),
        "right": sum(marks),
        "share": _share(sum(marks), len(marks)),
        "groups": {
            group: {"cases": len(marks), "right": sum(marks), "share": _share(sum(marks), len(marks))}
            for group, marks in groups.items()
        },
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * hits, made + wanted),
    }


def _places(pieces: list[str]) -> set[int]:
    return set(accumulate(len(piece) for piece in pieces[:-1]))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def render_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as two tables: overall, and right/cases by group."""
    lines = [
        "| segmenter | label | cases | right | share | precision | recall | F1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = " | ".join(f"{100 * row[key]:.1f}%" for key in ("share", "precision", "recall", "f1"))
        lines.append(f"| {row['segmenter']} | {row['label']} | {row['cases']} | {row['right']} | {figures} |")
    groups = list(dict.fromkeys(group for row in rows for group in row["groups"]))
    lines += ["", "| group | " + " | ".join(row["segmenter"] for row in rows) + " |"]
    lines.append("|---|" + "---:|" * len(rows))
    for group in groups:
        cells = (row["groups"].get(group) for row in rows)
        shown = (f"{cell['right']}/{cell['cases']}" if cell else "–" for cell in cells)
        lines.append(f"| {group} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
