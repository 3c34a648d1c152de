"""Results to read: tables on the terminal, and one HTML file that opens from disk without a network. No torch."""

from __future__ import annotations

import base64
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sentcompress.benchmark.drawing import BASELINE_COLOR, SENTENCE_COLOR, svg
from sentcompress.benchmark.measurement import Excerpts, Section, measurements
from sentcompress.benchmark.results import Results
from sentcompress.files import write_atomically
from sentcompress.table import Table, as_rich
from sentcompress.training.run_folder import OPPONENT

CSS = """
:root { --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --page: #f8fafc; --card: #fff; --ours: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 12px; }
.sub { color: var(--soft); margin: 0 0 24px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 22px; margin: 18px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; color: var(--ours); } .tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
p.note { color: var(--soft); font-size: 13px; margin: 10px 0 0; }
img { display: block; width: 100%; max-width: 800px; height: auto; margin: 6px 0 14px; }
img.wide { max-width: 100%; }
.sample { border-left: 3px solid var(--line); padding: 2px 0 2px 14px; margin: 14px 0; white-space: pre-wrap; }
.sample em { color: var(--soft); font-style: normal; } .sample strong { font-weight: 500; color: var(--ours); }
.bad { color: #b91c1c; }
.provenance { font: 12px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; color: var(--soft); }
"""


def sections(results: Results) -> dict[str, list[Section]]:
    """Tables of each measurement that has rows, with their figures; by the measurement's name."""
    found = {}
    for measurement in measurements():
        if results.rows_of(measurement.name):
            found[measurement.name] = measurement.sections(results)
            for section in found[measurement.name]:
                _without_empty_notes(section.table)
    return found


def _without_empty_notes(table: Table) -> None:
    if table.columns[-1] == "note" and not any(row[-1] for row in table.rows):
        table.columns.pop()
        table.rows = [row[:-1] for row in table.rows]


def tables(results: Results) -> list[Table]:
    """The tables that are printed, in order."""
    return [section.table for group in sections(results).values() for section in group if section.terminal]


def render(results: Results, console: Console) -> None:
    """Print all tables, what was not measured, and where the figures come from."""
    for table in tables(results):
        console.print(as_rich(table))
    for skipped in results.skipped:
        line = f"not measured: {skipped.part}, {skipped.what}: {skipped.reason}"
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for line in provenance_lines(results):
        console.print(Text(line, style="dim"), soft_wrap=True)


def provenance_lines(results: Results) -> list[str]:
    """Each line of provenance once, with the measurements and systems it stands for."""
    one_line = {measurement.name for measurement in measurements() if measurement.one_line}
    lines: dict[str, list[str]] = {}
    for row in results.rows:
        name = row.part if row.part in one_line else f"{row.part}: {row.system}"
        names = lines.setdefault(row.honesty.line(), [])
        if name not in names:
            names.append(name)
    return [f"[{'; '.join(names)}] {line}" for line, names in lines.items()]


def write_report(results: Results, path: Path) -> None:
    """Write the HTML report.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    write_atomically(path, render_report(results))


def render_report(results: Results) -> str:
    """The report as HTML; every text in it that is not ours is escaped."""
    title = escape(results.title)
    body = [f"<h1>{title}</h1>", f'<p class="sub">sentcompress benchmark, {escape(results.created)}</p>']
    body.append(_tiles(results))
    if any(curve.name == "loss" and curve.points for curve in results.curves):
        curves = svg(partial(_draw_losses, results), (9.4, 2.9))
        body.append(_section("Training", _image(curves, "loss curves", wide=True)))
    found = sections(results)
    for measurement in measurements():
        for section in found.get(measurement.name, ()):
            image, table = "", section.table
            if section.draw is not None:
                image = _image(svg(section.draw, section.size), table.title, wide=section.wide)
            body.append(_section(table.title, image + _table(table)))
        body += [_excerpts(excerpts) for excerpts in measurement.excerpts(results)]
    if results.samples:
        texts = [(sample.prompt, {"": sample.text}) for sample in results.samples]
        note = f"Prompts from held-out documents; {results.samples[0].system}."
        body.append(_excerpts(Excerpts("Samples", texts, note)))
    if results.skipped:
        items = "".join(
            f"<li>{escape(s.part)}: {escape(s.what)}: {escape(s.reason)}</li>" for s in results.skipped
        )
        body.append(_section("Not measured", f"<ul>{items}</ul>"))
    lines = "".join(f"<p>{escape(line)}</p>" for line in provenance_lines(results))
    body.append(_section("Where each row comes from", f'<div class="provenance">{lines}</div>'))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: sentcompress benchmark</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def _image(svg: str, alt: str, *, wide: bool = False) -> str:
    # As an image, not inline: nothing in it can act, and ids of two figures cannot collide.
    data = base64.b64encode(svg.encode("utf-8")).decode("ascii")
    style = ' class="wide"' if wide else ""
    return f'<img{style} alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}'
    )


def _cell(text: str) -> str:
    return f'<td class="bad">{escape(text)}</td>' if text == "FAIL" else f"<td>{escape(text)}</td>"


def _tiles(results: Results) -> str:
    """The headline figures."""
    tiles = [tile for measurement in measurements() for tile in measurement.tiles(results)]
    cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _excerpts(excerpts: Excerpts) -> str:
    items = f'<p class="note">{escape(excerpts.note)}</p>' if excerpts.note else ""
    for prompt, texts in excerpts.texts:
        alone = texts.get("")  # the one text of a prompt stands right behind it
        after = "" if alone is None else f"<strong>{escape(alone)}</strong>"
        items += f'<div class="sample"><em>{escape(prompt)}</em>{after}</div>'
        for system, text in texts.items():
            if system:
                items += f'<p class="note">{escape(system)}</p>'
                items += f'<div class="sample"><strong>{escape(text)}</strong></div>'
    return _section(excerpts.title, items)


def _draw_losses(results: Results, figure: Any) -> None:
    stages = list(dict.fromkeys(curve.stage for curve in results.curves if curve.name == "loss"))
    all_axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, stage in zip(all_axes, stages, strict=True):
        for curve in results.curves:
            if curve.stage == stage and curve.name == "loss":
                steps, values = zip(*curve.points, strict=True)
                token_level = stage == "baseline" or stage.startswith(OPPONENT)
                color = BASELINE_COLOR if token_level else SENTENCE_COLOR
                axes.plot(steps, values, color=color, linewidth=1.6)
        axes.set_title({"vae": "SentenceVAE"}.get(stage, stage))
        axes.set_xlabel("step")
    all_axes[0].set_ylabel("training loss")
