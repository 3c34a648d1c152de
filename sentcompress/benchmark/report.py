"""The HTML report: one file that opens from disk without a network. No torch."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from sentcompress.benchmark.plots import figures
from sentcompress.benchmark.records import Results
from sentcompress.benchmark.tables import BY_TITLES, TITLES, honesty_lines, tables
from sentcompress.benchmark.text_tables import DIFFERENCES_TITLE
from sentcompress.files import write_atomically
from sentcompress.table import Table, number, percent

STYLE = """
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
.honesty { font: 12px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; color: var(--soft); }
"""

TEXTS = 2
"""Prompts whose continuations the report shows."""


def write_report(results: Results, path: Path) -> None:
    """Write the report.

    Raises:
        InputError: matplotlib is not installed.
        StorageError: it cannot be written.
    """
    write_atomically(path, render_report(results))


def render_report(results: Results) -> str:
    """The report as HTML; every text in it that is not ours is escaped."""
    drawn = figures(results)
    title = escape(results.title)
    body = [f"<h1>{title}</h1>", f'<p class="sub">sentcompress benchmark, {escape(results.created)}</p>']
    body.append(_tiles(results))
    if "curves" in drawn:
        body.append(_section("Training", _image(drawn["curves"], "loss curves", wide=True)))
    titles = {title: part for part, title in TITLES.items()}
    titles |= {title: f"by {by}" for by, title in BY_TITLES.items()} | {DIFFERENCES_TITLE: "differences"}
    for table in tables(results):
        part = titles[table.title]
        image = _image(drawn[part], table.title, wide=part.startswith("by ")) if part in drawn else ""
        body.append(_section(table.title, image + _table(table)))
        if part == "reconstruct" and results.reconstruction:
            body.append(_examples(results.reconstruction.examples))
    body += [_texts(results), _samples(results)]
    if results.skipped:
        items = "".join(
            f"<li>{escape(s.part)}: {escape(s.what)}: {escape(s.reason)}</li>" for s in results.skipped
        )
        body.append(_section("Not measured", f"<ul>{items}</ul>"))
    lines = "".join(f"<p>{escape(line)}</p>" for line in honesty_lines(results))
    body.append(_section("Where each row comes from", f'<div class="honesty">{lines}</div>'))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: sentcompress benchmark</title><style>{STYLE}</style></head>"
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
    """The headline."""
    tiles: list[tuple[str, str]] = []
    scores = {score.system: score for score in results.quality}
    if "sentence model" in scores:
        text = "bits per byte, sentence model"
        if twin := scores.get("baseline, equal data"):
            text += f" (equal-data baseline {twin.bits_per_byte:.3f})"
        tiles.append((f"{scores['sentence model'].bits_per_byte:.3f}", text))
    if results.reconstruction:
        exact = percent(results.reconstruction.exact_sentences)
        tiles.append((exact, "held-out sentences reconstructed exactly"))
    if results.speed:
        ours = next(
            (r for r in results.speed.runs if r.ratio is not None and r.system == "sentence model"), None
        )
        if ours:
            tiles.append((f"{ours.ratio:.2f}x", f"output tokens/s of the backbone, batch {ours.batch_size}"))
    if len(results.memory) == 2:
        a, b = (report.cache_bytes_per_token for report in results.memory)
        tiles.append(
            (f"{a / b:.1f}x", f"smaller cache a token ({number(b, 0)} instead of {number(a, 0)} bytes)")
        )
    if results.causality:
        future = max(c.max_delta for c in results.causality.checks if c.kind == "future")
        verdict = "causal: largest effect of the future" if results.causality.passed else "NOT causal"
        tiles.append((f"{future:g}" if future else "0.0", verdict))
    cells = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _examples(examples: list[tuple[str, str]]) -> str:
    rows = [[repr(a)[1:-1], repr(b)[1:-1] if b != a else "the same"] for a, b in examples]
    return _section(
        "Reconstructed sentences", _table(Table("", ["held-out sentence", "what came back"], rows, []))
    )


def _texts(results: Results) -> str:
    """What every system wrote after the first prompts."""
    if not results.text:
        return ""
    items = ""
    for index, prompt in enumerate(results.text.prompts[:TEXTS]):
        items += f'<div class="sample"><em>{escape(prompt)}</em></div>'
        for score in results.text.scores:
            text = escape(score.texts[index])
            items += (
                f'<p class="note">{escape(score.system)}</p><div class="sample"><strong>{text}</strong></div>'
            )
    return _section("Texts after the same prompts", items)


def _samples(results: Results) -> str:
    if not results.samples:
        return ""
    items = "".join(
        f'<div class="sample"><em>{escape(s.prompt)}</em><strong>{escape(s.text)}</strong></div>'
        for s in results.samples
    )
    how = escape(results.samples[0].system)
    return _section("Samples", f'<p class="note">Prompts from held-out documents; {how}.</p>{items}')
