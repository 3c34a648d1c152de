"""Results as tables: the same cells on the terminal and in the HTML report. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sentcompress.benchmark.paper import paper_row
from sentcompress.benchmark.records import BY, By, CausalityCheck, PartTime, Results, Row, SpeedReport
from sentcompress.benchmark.rows import OURS, TWINS, breakdown
from sentcompress.benchmark.text_tables import TEXT_TITLE, text_differences, text_table
from sentcompress.table import Figure, Table, as_rich, number, percent

TITLES = {
    "causality": "Causality: what the future may change of the past",
    "quality": "Quality on held-out documents",
    "text": TEXT_TITLE,
    "reconstruct": "Reconstruction of held-out sentences",
    "speed": "Speed",
    "memory": "Memory",
    "data": "Data",
    "segments": "Segmenters on labelled hard cases",
}

BY_TITLES: dict[By, str] = {
    "position": "Quality by position of the token in its sentence",
    "length": "Quality by tokens of the sentence",
    "index": "Quality by sentence of the document (0 is context)",
}


def _times(value: Figure) -> str:
    return f"{value:.2f}x" if isinstance(value, int | float) else "-"


def _size(value: Figure) -> str:
    if not isinstance(value, int | float):
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def tables(results: Results) -> list[Table]:
    """One table for each part that was measured, and for each breakdown."""
    makers = {
        "causality": _causality,
        "quality": _quality,
        "text": text_table,
        "reconstruct": _reconstruct,
        "speed": _speed,
        "memory": _memory,
        "data": _data,
        "segments": _segments,
    }
    made = []
    for part in results.measured():
        made.append(makers[part](results, [r for r in results.rows if r.part == part]))
        if part == "quality":
            broken = [by for by in BY if any(by in score.by for score in results.quality)]
            made += [_by(results, by, explain=by == broken[0]) for by in broken]
        if part == "text" and results.text and any(score.differences for score in results.text.scores):
            made.append(text_differences(results.text))
    return [_without_empty_notes(table) for table in made]


def _without_empty_notes(table: Table) -> Table:
    if table.columns[-1] == "note" and not any(row[-1] for row in table.rows):
        table.columns.pop()
        table.rows = [row[:-1] for row in table.rows]
    return table


def _causality(results: Results, rows: Sequence[Row]) -> Table:
    checks = results.causality.checks if results.causality else []
    names: dict[str, list[CausalityCheck]] = {}
    for check in checks:
        names.setdefault(check.name, []).append(check)
    backends = list(dict.fromkeys(check.attention for check in checks))
    lines = []
    for name, group in names.items():
        by = {check.attention: check for check in group}
        cells = [f"{by[b].max_delta:.1e}" if by[b].max_delta else "0.0" for b in backends]
        kind = (
            "must be 0.0" if group[0].kind == "future" else f"at most {max(c.tolerance for c in group):.0e}"
        )
        lines.append([name, kind, *cells, "pass" if all(c.passed for c in group) else "FAIL"])
    passed = sum(check.passed for check in checks)
    notes = [f"{passed} of {len(checks)} checks passed. Figures are the largest |difference| seen."]
    notes += [f"{c.name} ({c.attention}): {c.detail}" for c in checks if c.detail]
    del rows
    return Table(TITLES["causality"], ["check", "allowed", *backends, ""], lines, notes)


def _quality(results: Results, rows: Sequence[Row]) -> Table:
    lines = [
        [
            row.system,
            number(row.figures["bits_per_byte"], 4),
            number(row.figures["perplexity"], 2),
            number(row.figures.get("bits_per_byte_end_marks"), 4),
            number(row.figures.get("bits_per_byte_stop_decisions"), 4),
            row.note,
        ]
        for row in rows
    ]
    notes = []
    if results.quality:
        first = results.quality[0]
        notes.append(
            f"Every system scored the same {first.bytes:,} bytes of {len(first.documents)} held-out documents: "
            "everything after the first sentence of each. Coverage proven: each byte charged exactly once, one end "
            "mark a sentence, no padding. Perplexity is by the baseline's tokens of the uncut text "
            f"({first.baseline_tokens:,}). The sentence model pays for end marks and stop decisions; their part of "
            "its bits per byte is shown."
        )
    tokens = {row.system: row.honesty.training_tokens for row in rows}
    ours, twin = tokens.get("sentence model"), tokens.get("baseline, equal data")
    if ours and twin:
        before = "include the SentenceVAE's training, which has no counterpart there"
        if not results.recipe["train_vae"]["steps"]:
            before = "are the same text, a sentence at a time: its SentenceVAE was not trained before"
        notes.append(
            f"Equal data: the baseline was trained on the graft's passages for as many steps ({twin:,} tokens). "
            f"The sentence model's {ours:,} tokens {before}."
        )
    notes += _cost_note(results)
    notes += _paper_notes(results, "quality")
    columns = ["system", "bits/byte", "perplexity", "of it: end marks", "stop decisions", "note"]
    return Table(TITLES["quality"], columns, lines, notes)


def _cost_note(results: Results) -> list[str]:
    """What a token of text costs the sentence model, as a share of its twin's."""
    costs = {score.system: score.cost for score in results.quality if score.cost}
    twin = next((name for name in TWINS if name in costs), None)
    if twin is None or OURS not in costs:
        return []
    ours, theirs = costs[OURS], costs[twin]
    return [
        f"To write a token of such text at batch 1 (computed from shapes, {theirs.text_tokens:,.0f} tokens into the "
        f"text, sentences of {ours.sentence_tokens:.1f} tokens) the sentence model takes {ours.flops / 1e6:,.2f} MFLOP "
        f"and reads {_size(ours.bytes)}, the {twin.partition(',')[0]} {theirs.flops / 1e6:,.2f} MFLOP and "
        f"{_size(theirs.bytes)}: {ours.flops / theirs.flops:.0%} and {ours.bytes / theirs.bytes:.0%}."
    ]


def _by(results: Results, by: By, *, explain: bool) -> Table:
    twin, rows = breakdown(results.quality, by)
    systems = [name for name in (OURS, *TWINS) if any(name in row.bits for row in rows)]
    marks = any(row.with_marks is not None for row in rows)
    lines = []
    for row in rows:
        cells = [row.label, number(row.bytes or None)]
        cells += [number(row.bits.get(name), 4) for name in systems]
        if twin:
            cells.append(number(row.ratio))
            cells += [number(row.with_marks)] if marks else []
            cells += [number(row.gap, 4), percent(row.share)]
        lines.append(cells)
    columns = [by, "bytes", *systems]
    notes = []
    if explain:
        notes.append(
            "Bits per byte of the bucket's bytes; of end marks and stop decisions, over all bytes. For every system, a "
            "byte belongs to the token of the sentence model it lies in, and a token's nats are spread evenly over its "
            "bytes. The buckets' bytes and nats were proven to add up to the whole."
        )
    if twin:
        columns += ["ratio", *(["with marks"] if marks else []), "gap", "share of gap"]
    if twin and explain:
        notes.append(
            f"Ratio to '{twin}'. Gap: what the sentence model pays more, as bits over all bytes; gaps add up."
        )
    if marks:
        notes.append("With marks: the ratio with the end marks and decisions of these sentences.")
    return Table(BY_TITLES[by], columns, lines, notes)


def _reconstruct(results: Results, rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        figures = row.figures
        lines.append(
            [
                row.system,
                percent(figures["token_accuracy"]),
                percent(figures["exact_sentences"]),
                number(figures["teacher_forced_perplexity"]),
                percent(figures["teacher_forced_exact"]),
                number(figures["sentences"]),
                row.note,
            ]
        )
    notes = [
        "Tokens right by position and whole sentences right are free-running greedy; the rest is teacher-forced."
    ]
    if results.reconstruction and results.reconstruction.extra:
        extra = (f"{name} {number(value, 4)}" for name, value in results.reconstruction.extra.items())
        notes.append("Metric plugins: " + ", ".join(extra))
    columns = [
        "system",
        "tokens right",
        "sentences exact",
        "forced perplexity",
        "forced exact",
        "sentences",
        "note",
    ]
    return Table(TITLES["reconstruct"], columns, lines, notes + _paper_notes(results, "reconstruct"))


def _speed(results: Results, rows: Sequence[Row]) -> Table:
    lines = [
        [
            number(row.figures["batch_size"]),
            row.system,
            number(row.figures["prefill_tokens_per_second"], 0),
            number(row.figures["first_token_ms"], 1),
            number(row.figures["output_tokens_per_second"], 1),
            _times(row.figures["ratio"]),
            _times(row.figures["total_ratio"]),
            percent(row.figures["roofline_share"]),
            row.note,
        ]
        for row in rows
    ]
    notes = []
    if results.speed:
        speed = results.speed
        notes.append(
            f"{speed.prompt_tokens} prompt tokens and {speed.new_tokens} new ones; median of {speed.repeats} "
            "alternating runs, ratios taken pair by pair. Output tokens/s is after the first token; the whole run "
            "includes the prefill. Roofline: share of the speed that the measured memory bandwidth, "
            f"{speed.bandwidth_bytes_per_second / 1e9:.1f} GB/s, allows."
        )
        draw = ", ".join(map(str, speed.sentence_lengths[:24]))
        more = ", ..." if len(speed.sentence_lengths) > 24 else ""
        notes.append(
            f"The sentence model was held to sentence lengths drawn from held-out text: {draw}{more}."
        )
        if speed.head == "shortlist":
            notes.append(
                "Output head: a shortlist predicted for each sentence; other tokens than the full head's may be "
                "written (`bench quality` says what that costs)."
            )
        elif speed.head != "exact":
            rates = [run.fallback_rate for run in speed.runs if run.fallback_rate is not None]
            notes.append(
                f"Output head: {speed.head}, the same tokens as the full head, which had to be read for at most "
                f"{max(rates):.2%} of them."
            )
        notes += _profile(speed)
        notes += _throughput(speed)
        notes += speed.advice
    columns = [
        "batch",
        "system",
        "prefill tok/s",
        "first token ms",
        "output tok/s",
        "ratio",
        "whole run",
        "roofline",
    ]
    return Table(TITLES["speed"], [*columns, "note"], lines, notes + _paper_notes(results, "speed"))


def _throughput(speed: SpeedReport) -> list[str]:
    """What more processes bring, a line a system."""
    lines: dict[str, list[str]] = {}
    for found in speed.throughput:
        shown = f"{found.processes}: {found.tokens_per_second:,.1f}"
        if found.processes > 1:
            shown += f" ({found.efficiency:.0%} of as many times one)"
        lines.setdefault(f"{found.system}, batch {found.batch_size} each", []).append(shown)
    return [
        f"Tokens/s by number of processes, prefill included, {system}: {', '.join(found)}."
        for system, found in lines.items()
    ]


def _profile(speed: SpeedReport) -> list[str]:
    """Where a token's time goes, a line a system and batch size."""
    groups: dict[tuple[int, str], list[PartTime]] = {}
    for entry in speed.profile:
        groups.setdefault((entry.batch_size, entry.system), []).append(entry)
    return [
        f"Where the time goes, {system}, batch {batch}: "
        f"{sum(e.milliseconds_per_token for e in entries):.2f} ms a token: "
        + ", ".join(f"{e.part} {e.share:.1%} ({e.milliseconds_per_token:.2f})" for e in entries)
        for (batch, system), entries in groups.items()
    ]


def _memory(results: Results, rows: Sequence[Row]) -> Table:
    lines = [
        [
            row.system,
            number(row.figures["cache_bytes_per_token"], 1),
            number(row.figures["peak_slope_bytes_per_token"], 1),
            _size(row.figures["weight_bytes"]),
            _size(row.figures["transient_bytes"]),
            number(row.figures["longest_context_tokens"]),
            number(row.figures["position_limit_tokens"]),
        ]
        for row in rows
    ]
    notes = []
    if results.memory:
        by = {report.system: report.cache_bytes_per_token for report in results.memory}
        if len(by) == 2:
            a, b = by.values()
            notes.append(f"The sentence model's cache is {a / b:.1f} times smaller a token of text.")
        notes.append(
            f"Longest text: tokens whose cache fits in {_size(results.memory[0].budget_bytes)}, beside the tokens the "
            "backbone has positions for. Slope: straight line through the peak of allocated memory against tokens."
        )
    columns = [
        "system",
        "cache B/token",
        "slope B/token",
        "weights",
        "while writing",
        "longest text",
        "positions for",
    ]
    return Table(TITLES["memory"], columns, lines, notes + _paper_notes(results, "memory"))


def _data(results: Results, rows: Sequence[Row]) -> Table:
    del results
    lines = []
    for row in rows:
        for name, value in row.figures.items():
            share = name.startswith("padding") or name == "cutting_overhead"
            lines.append([name.replace("_", " "), percent(value) if share else number(value)])
    return Table(TITLES["data"], ["figure", "value"], lines, [])


def _segments(results: Results, rows: Sequence[Row]) -> Table:
    del results
    lines = [
        [
            row.system,
            number(row.figures["cases"]),
            number(row.figures["right"]),
            percent(row.figures["share"]),
        ]
        for row in rows
    ]
    return Table(TITLES["segments"], ["segmenter", "cases", "right", "share"], lines, [])


def _paper_notes(results: Results, part: str) -> list[str]:
    """What the paper printed for this backbone and depth, marked as the paper's."""
    line = paper_row(results.recipe, part)
    return (
        [f"The paper's figures (its own hardware and text, and not causal: see the docs): {line}"]
        if line
        else []
    )


def render(results: Results, console: Console) -> None:
    """Print all tables, what was not measured, and the honesty line."""
    for table in tables(results):
        console.print(as_rich(table))
    for skipped in results.skipped:
        line = f"not measured: {skipped.part}, {skipped.what}: {skipped.reason}"
        console.print(Text(line, style="yellow"), soft_wrap=True)
    for line in honesty_lines(results):
        console.print(Text(line, style="dim"), soft_wrap=True)


def honesty_lines(results: Results) -> list[str]:
    """Each honesty line once, with the parts and systems it stands for."""
    lines: dict[str, list[str]] = {}
    for row in results.rows:
        name = row.part if row.part in ("causality", "data", "segments") else f"{row.part}: {row.system}"
        names = lines.setdefault(row.honesty.line(), [])
        if name not in names:
            names.append(name)
    return [f"[{'; '.join(names)}] {line}" for line, names in lines.items()]
