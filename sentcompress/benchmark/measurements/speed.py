"""Speed beside the backbone's own ``generate``. No torch but in ``measure``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sentcompress.benchmark.drawing import bars
from sentcompress.benchmark.measurement import SENTENCE_MODEL, Compared, Flag, Measurement, Section
from sentcompress.benchmark.paper import sllm_note
from sentcompress.benchmark.results import Row, Skipped
from sentcompress.errors import InputError
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench
    from sentcompress.recipe import BenchSettings


def parse_bytes(option: str, text: str) -> int:
    """The number of bytes in a text such as ``4GiB``. Raises InputError."""
    units = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in units or not float(found[1]):
        raise InputError(f"{option}: '{text}' is not a size", fix="write it like 4GiB, 500MB or 4294967296")
    return int(float(found[1]) * units[found[2].upper()])


LARGEST_BATCH = Flag(
    "--largest-batch",
    "largest_batch",
    "Also time each system at the largest batch whose cache fits into this many bytes, such as 4GiB.",
    lambda text: {"largest_batch": True, "memory_budget_bytes": parse_bytes("--largest-batch", text)},
    metavar="BYTES",
)


class SpeedRun(Record):
    """One system at one batch size: medians over the repeats."""

    system: str
    batch_size: int
    prefill_tokens_per_second: float | None
    first_token_seconds: float
    output_tokens_per_second: float
    """New tokens after the first, over the time after the first."""
    total_seconds: float
    ratio: float | None
    """Median over the pairs of its output tokens per second and the backbone's measured beside it."""
    ratios: list[float] = []
    total_ratio: float | None = None
    """The same for the whole run, prefill included."""
    roofline_share: float | None = None
    """Seconds that the bytes read per token take at the measured bandwidth, over the seconds measured."""
    fallback_rate: float | None = None
    """Share of tokens that took the full output head because the shortlist could not be proven right."""
    note: str = ""


class PartTime(Record):
    """Where the time per token goes in one system, at one batch size; the prefill is shared among the tokens."""

    system: str
    batch_size: int
    part: str
    milliseconds_per_token: float
    """Of the time per token of the whole batch."""
    share: float
    """Of the system's time; the shares of its parts sum to 1."""


class Throughput(Record):
    """Output speed of some of a run's processes, each with its own device and prompts."""

    system: str
    processes: int
    batch_size: int
    """Of each process."""
    tokens_per_second: float
    """Of all together, prefill included; median of ``rates``."""
    rates: list[float]
    """By repeat."""
    efficiency: float
    """Over the speed of the first alone, times the number of processes; median over repeats, measured in turns."""


class SpeedReport(Record):
    """Speed beside the backbone's."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    trained: bool
    sentence_lengths: list[int]
    """The forced sentence lengths."""
    bandwidth_bytes_per_second: float
    head: str = "exact"
    """Output head with which the sentence model picked tokens."""
    quantized: list[str] = []
    """Modules of the sentence model with weights in 8 bits."""
    runs: list[SpeedRun]
    output_ratio: float | None = None
    """The sentence model's output tokens per second over the backbone's, at the smallest batch."""
    prefill_ratio: float | None = None
    """The same for the prompt's tokens."""
    fallback_rate: float | None = None
    """Of the output head, at the smallest batch."""
    roofline_share: float | None = None
    """Of the sentence model, at batch 1."""
    profile: list[PartTime] = []
    throughput: list[Throughput] = []
    """By number of processes, where several processes measured."""
    skipped: list[Skipped] = []
    break_even: dict[str, Figure] = {}
    advice: list[str] = []
    """The break-even in words, and when something else is the better choice."""


class Speed(Measurement[SpeedReport | None]):
    """Tokens/s, time to first token and break-even beside the backbone's own generate."""

    title = "Speed"
    order = 50
    distributed = True
    headline = True
    random_weights = True
    compared = (
        "prefill_tokens_per_second",
        "first_token_ms",
        "output_tokens_per_second",
        "ratio",
        "total_ratio",
    )
    options = ("device", "dtype", "head", "quantize", "compile", "profile")
    flags = (LARGEST_BATCH,)
    examples = (
        "sentcompress bench speed out/quickstart",
        "sentcompress bench speed --backbone opt-125m --init random --out out/speed-125m",
        "sentcompress bench speed out/quickstart --profile --quantize decoder,encoder",
        "sentcompress bench speed out/quickstart --largest-batch 1GiB --set bench.prompt_tokens=300",
        "sentcompress bench speed --backbone opt-1.3b --init random --device cuda --dtype bf16 --compile",
        "sentcompress bench speed out/quickstart --set 'bench.batch_sizes=[1,4,16]'",
    )

    def measure(self, bench: Bench) -> SpeedReport | None:
        from sentcompress.benchmark.heldout_text import draw_lengths
        from sentcompress.benchmark.speed_runs import measure_speed
        from sentcompress.benchmark.throughput import measure_throughput
        from sentcompress.benchmark.timing import DRAWN_LENGTHS, speed_models
        from sentcompress.distributed import processes

        timed, settings = bench.shared(speed_models), bench.settings
        lengths = draw_lengths(bench.models.corpus, DRAWN_LENGTHS, bench.recipe.seed)
        throughput = []
        if processes().num_processes > 1:
            throughput = measure_throughput(timed, lengths, settings)
        if not processes().is_main_process:
            return None  # the first process measures the rest alone
        report = measure_speed(
            timed.model,
            timed.backbone,
            sentences=timed.sentences,
            sentence_lengths=lengths,
            settings=settings,
            trained=timed.trained,
            bos_token_id=timed.bos_token_id,
        )
        report.throughput = throughput
        bench.results.skipped += report.skipped
        for run in report.runs:
            ours = run.system == SENTENCE_MODEL
            bench.row(
                self.name,
                run.system,
                _figures(run),
                bench.graft_stages if timed.trained and ours else (),
                "; ".join(filter(None, (_settings_note(report, settings) if ours else "", run.note))),
                timed.model if ours else timed.backbone,
            )
        return report

    def comparison(self, results: Results) -> list[Compared]:
        return [
            Compared(f"{row.system}, batch {row.figures['batch_size']}", name, row.figures.get(name))
            for row in results.rows_of(self.name)
            for name in self.compared
        ]

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        report = self.of(results)
        for run in report.runs if report else ():
            if run.ratio is not None and run.system == SENTENCE_MODEL:
                return [(f"{run.ratio:.2f}x", f"the backbone's output tokens/s, batch {run.batch_size}")]
        return []

    def sections(self, results: Results) -> list[Section]:
        report = self.of(results)
        table = _table(results, report, results.rows_of(self.name))
        return [Section(table, partial(_draw, report) if report and report.runs else None, (7.6, 2.6))]


def _figures(run: SpeedRun) -> dict[str, Figure]:
    return {
        "batch_size": run.batch_size,
        "prefill_tokens_per_second": run.prefill_tokens_per_second,
        "first_token_ms": 1000 * run.first_token_seconds,
        "output_tokens_per_second": run.output_tokens_per_second,
        "ratio": run.ratio,
        "ratio_lowest": min(run.ratios, default=None),
        "ratio_highest": max(run.ratios, default=None),
        "total_ratio": run.total_ratio,
        "total_seconds": run.total_seconds,
        "roofline_share": run.roofline_share,
        "fallback_rate": run.fallback_rate,
    }


def _settings_note(report: SpeedReport, settings: BenchSettings) -> str:
    """How the sentence model was run."""
    notes = [
        "forced lengths drawn from held-out text",
        "" if report.trained else "untrained weights",
        f"head {report.head}",
        "" if settings.cache == "full" else f"cache {settings.cache}",
        "compiled" if settings.compile else "",
        f"8 bits: {', '.join(report.quantized)}" if report.quantized else "",
    ]
    return "; ".join(filter(None, notes))


def _times(value: Figure) -> str:
    return f"{value:.2f}x" if isinstance(value, int | float) else "-"


def _table(results: Results, report: SpeedReport | None, rows: Sequence[Row]) -> Table:
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
    notes = _notes(report) if report else []
    notes += sllm_note(
        results.recipe,
        lambda paper: (
            f"{paper.speed} output tokens/s, OPT {paper.opt_speed}: {paper.speed / paper.opt_speed:.2f}x"
        ),
    )
    speeds = ["prefill tok/s", "first token ms", "output tok/s"]
    columns = ["batch", "system", *speeds, "ratio", "whole run", "roofline", "note"]
    return Table(Speed.title, columns, lines, notes)


def _notes(speed: SpeedReport) -> list[str]:
    lengths = ", ".join(map(str, speed.sentence_lengths[:24]))
    more = ", ..." if len(speed.sentence_lengths) > 24 else ""
    notes = [
        f"{speed.prompt_tokens} prompt tokens and {speed.new_tokens} new ones; median of {speed.repeats} "
        "alternating runs, ratios taken pair by pair. Output tokens/s counts what comes after the first token; the "
        "whole run includes the prefill. Roofline: share of the speed that the measured memory bandwidth, "
        f"{speed.bandwidth_bytes_per_second / 1e9:.1f} GB/s, allows.",
        f"The sentence model was given sentence lengths drawn from held-out text: {lengths}{more}.",
    ]
    if speed.head == "shortlist":
        notes.append(
            "Output head: a shortlist predicted for each sentence. It may write different tokens than the full head "
            "(`bench quality` measures what that costs)."
        )
    elif speed.head != "exact":
        rates = [run.fallback_rate for run in speed.runs if run.fallback_rate is not None]
        notes.append(
            f"Output head: {speed.head}. It writes the same tokens as the full head, which it needed for at most "
            f"{max(rates):.2%} of them."
        )
    return notes + _profile_notes(speed) + _throughput_notes(speed) + speed.advice


def _profile_notes(speed: SpeedReport) -> list[str]:
    """Where the time per token goes: one line per system and batch size."""
    groups: dict[tuple[int, str], list[PartTime]] = {}
    for entry in speed.profile:
        groups.setdefault((entry.batch_size, entry.system), []).append(entry)
    return [
        f"Where the time goes, {system}, batch {batch}: "
        f"{sum(e.milliseconds_per_token for e in entries):.2f} ms per token: "
        + ", ".join(f"{e.part} {e.share:.1%} ({e.milliseconds_per_token:.2f})" for e in entries)
        for (batch, system), entries in groups.items()
    ]


def _throughput_notes(speed: SpeedReport) -> list[str]:
    """What more processes bring: one line per system."""
    lines: dict[str, list[str]] = {}
    for found in speed.throughput:
        shown = f"{found.processes}: {found.tokens_per_second:,.1f}"
        if found.processes > 1:
            shown += f" ({found.efficiency:.0%} of {found.processes} times one)"
        lines.setdefault(f"{found.system}, batch {found.batch_size} each", []).append(shown)
    return [
        f"Tokens/s by number of processes, prefill included, {system}: {', '.join(found)}."
        for system, found in lines.items()
    ]


def _draw(report: SpeedReport, figure: Any) -> None:
    axes = figure.subplots()
    runs = report.runs
    several = len({run.batch_size for run in runs}) > 1
    names = [run.system for run in runs]
    labels = [
        f"{run.output_tokens_per_second:,.0f}" + (f"  ({run.ratio:.2f}x)" if run.ratio is not None else "")
        for run in runs
    ]
    bars(axes, names, [run.output_tokens_per_second for run in runs], labels)
    if several:
        labels = [f"{run.system}, batch {run.batch_size}" for run in runs]
        axes.set_yticks(np.arange(len(runs)), labels)
    axes.set_title("Output tokens per second")
    axes.set_xlabel("tokens/s")
