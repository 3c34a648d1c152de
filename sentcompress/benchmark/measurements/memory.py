"""Cache bytes per token, slope of allocated memory, longest text in a budget. No torch but in ``measure``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sentcompress.benchmark.drawing import COLORS, GREY
from sentcompress.benchmark.measurement import SENTENCE_MODEL, Measurement, Section
from sentcompress.benchmark.paper import sllm_note
from sentcompress.provenance import Record
from sentcompress.table import Figure, Table, byte_size, number

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.benchmark.runner import Bench


class MemoryReport(Record):
    """Cache and peak memory of one system."""

    system: str
    weight_bytes: int
    cache_bytes_per_token: float
    """Exact: bytes of the cache's tensors over the tokens of text they stand for."""
    cache_bytes_per_position: int
    transient_bytes: int
    """Held only while a sentence is written (the decoder's own cache)."""
    peak_slope_bytes_per_token: float
    """Straight line through allocated memory against tokens generated, as in the paper."""
    series: list[tuple[int, int]]
    """Tokens of text, and peak of bytes allocated beyond the weights since the previous point."""
    budget_bytes: int
    longest_context_tokens: int
    """Tokens of text whose cache fits in the budget."""
    position_limit_tokens: int
    """Tokens of text the backbone has positions for."""


class Memory(Measurement[list[MemoryReport]]):
    """Cache bytes per token, growth of memory, longest text in a budget."""

    title = "Memory"
    order = 60
    random_weights = True
    compared = ("cache_bytes_per_token", "peak_slope_bytes_per_token", "longest_context_tokens")
    options = ("device", "dtype")
    examples = (
        "sentcompress bench memory out/quickstart",
        "sentcompress bench memory --backbone opt-1.3b --init random --out out/memory-1.3b",
    )

    def measure(self, bench: Bench) -> list[MemoryReport]:
        from sentcompress.benchmark.heldout_text import draw_lengths
        from sentcompress.benchmark.memory_meter import measure_memory
        from sentcompress.benchmark.timing import DRAWN_LENGTHS, speed_models

        timed, settings = bench.shared(speed_models), bench.settings
        reports = measure_memory(
            timed.model,
            timed.backbone,
            sentences=timed.sentences,
            sentence_lengths=draw_lengths(bench.models.corpus, DRAWN_LENGTHS, bench.recipe.seed),
            new_tokens=settings.new_tokens,
            bos_token_id=timed.bos_token_id,
            budget=settings.memory_budget_bytes,
            cache=settings.cache,
        )
        for report in reports:
            ours = report.system == SENTENCE_MODEL
            stages = bench.graft_stages if timed.trained and ours else ()
            bench.row(
                self.name,
                report.system,
                _figures(report),
                stages,
                model=timed.model if ours else timed.backbone,
            )
        return reports

    def tiles(self, results: Results) -> list[tuple[str, str]]:
        reports = self.of(results)
        if len(reports) != 2:
            return []
        a, b = (report.cache_bytes_per_token for report in reports)
        text = f"smaller cache per token ({number(b, 0)} instead of {number(a, 0)} bytes)"
        return [(f"{a / b:.1f}x", text)]

    def sections(self, results: Results) -> list[Section]:
        reports = self.of(results)
        lines = [
            [
                row.system,
                number(row.figures["cache_bytes_per_token"], 1),
                number(row.figures["peak_slope_bytes_per_token"], 1),
                byte_size(row.figures["weight_bytes"]),
                byte_size(row.figures["transient_bytes"]),
                number(row.figures["longest_context_tokens"]),
                number(row.figures["position_limit_tokens"]),
            ]
            for row in results.rows_of(self.name)
        ]
        notes = []
        if len({report.system for report in reports}) == 2:
            a, b = (report.cache_bytes_per_token for report in reports)
            notes.append(f"The sentence model's cache is {a / b:.1f} times smaller per token of text.")
        if reports:
            notes.append(
                f"Longest text: number of tokens whose cache fits in {byte_size(reports[0].budget_bytes)}, even if the "
                "backbone has fewer positions. Slope: of a straight line fitted to peak allocated memory against "
                "tokens. Temporary cache: held only while a sentence is written."
            )
        notes += sllm_note(
            results.recipe, lambda paper: f"{paper.memory} KB per token, OPT {paper.opt_memory} KB"
        )
        columns = ["system", "cache B/token", "slope B/token", "weights", "temporary cache", "longest text"]
        table = Table(self.title, [*columns, "position limit"], lines, notes)
        has_series = any(report.series for report in reports)
        return [Section(table, partial(_draw, reports) if has_series else None, (7.6, 3.1))]


def _figures(report: MemoryReport) -> dict[str, Figure]:
    return {
        "cache_bytes_per_token": report.cache_bytes_per_token,
        "cache_bytes_per_position": report.cache_bytes_per_position,
        "transient_bytes": report.transient_bytes,
        "peak_slope_bytes_per_token": report.peak_slope_bytes_per_token,
        "weight_bytes": report.weight_bytes,
        "budget_bytes": report.budget_bytes,
        "longest_context_tokens": report.longest_context_tokens,
        "position_limit_tokens": report.position_limit_tokens,
    }


def _draw(reports: Sequence[MemoryReport], figure: Any) -> None:
    axes = figure.subplots()
    for report in reports:
        tokens, sizes = np.array(report.series, dtype=np.float64).T
        color = COLORS.get(report.system, GREY)
        cache = tokens * report.cache_bytes_per_token / 2**20
        axes.plot(tokens, sizes / 2**20, color=color, linewidth=1.8, label=report.system)
        axes.plot(tokens, cache, color=color, linestyle=":", linewidth=1.2)
    axes.set_title("Memory beyond the weights against length of text")
    axes.set_xlabel("tokens of text (dotted: the cache alone, from its tensors)")
    axes.set_ylabel("MiB, peak")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
