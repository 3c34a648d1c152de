"""Where the sentence model stops being faster, and what to choose instead.

``bench speed`` looks for it at batch 1 (:func:`break_even`); ``bench sweep`` times a grid of batch size, prompt length
and sentence length (:func:`sweep_speed`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.speed import SpeedReport
from sentcompress.benchmark.timing import (
    LOOKUP,
    LOOKUP_TOKENS,
    SentenceSystem,
    System,
    TokenSystem,
    alternate,
    both_systems,
    make_prompts,
    quiet_transformers,
    require_positions,
)
from sentcompress.errors import InputError
from sentcompress.files import storage_errors, write_atomically
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings
from sentcompress.table import Table

SWEEP_FILE = "speed-sweep.json"
BREAK_EVEN_REPEATS = 3
"""The most alternating runs of each figure of :func:`break_even`."""


def break_even(
    token_system: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    report: SpeedReport,
    settings: BenchSettings,
) -> tuple[dict[str, Any], list[str]]:
    """Figures and sentences on where the sentence model stops being faster: batch, sentence and text length."""
    sweep = {run.batch_size: run.ratio for run in report.runs if run.system == SENTENCE_MODEL and run.ratio}
    slower = [size for size, ratio in sorted(sweep.items()) if ratio < 1]
    tested = ", ".join(map(str, sorted(sweep)))
    figures: dict[str, Any] = {
        "batch_size_not_faster_from": slower[0] if slower else None,
        "batch_sizes_tested": tested,
    }
    lines = [
        f"Batch size: slower than the backbone from batch {slower[0]} on (tested: {tested})."
        if slower
        else f"Batch size: faster at every batch size tested ({tested})."
    ]
    lines.append(_sentence_length_break_even(token_system, sentence_system, sentences, settings, figures))
    lines.append(_text_length_break_even(token_system, sentence_system, sentences, settings, report, figures))
    lookup = [run.ratio for run in report.runs if run.system == LOOKUP and run.ratio]
    lines.append(_alternatives(max(sweep.values(), default=0.0), lookup))
    return figures, lines


def _sentence_length_break_even(
    token_system: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    figures: dict[str, Any],
) -> str:
    """Time short and long sentences; seconds per token are a straight line in 1 / length."""
    longest = sentence_system.model.config.vae_config.max_sentence_tokens
    short, long = 2, min(longest, max(3, settings.new_tokens // 2, 8))
    prompts = make_prompts(sentences, settings.prompt_tokens, 1)
    new = settings.new_tokens
    systems = [token_system, *(sentence_system.with_lengths([n]) for n in (short, long))]
    times = alternate(systems, prompts, new, min(BREAK_EVEN_REPEATS, settings.repeats))
    base, *ours = (statistics.median(column) / new for column in zip(*times, strict=True))
    cost = dict(zip((short, long), ours, strict=True))
    slope = (cost[short] - cost[long]) / (1 / short - 1 / long)
    floor = cost[long] - slope / long
    figures |= {
        "seconds_per_sentence": slope,
        "seconds_per_token_in_a_sentence": floor,
        "backbone_seconds": base,
    }
    if floor >= base:
        figures["sentence_length_faster_from"] = None
        return "Sentence length: slower at every sentence length; the decoder takes too long per token."
    even = max(1.0, slope / (base - floor))
    figures["sentence_length_faster_from"] = even
    return (
        f"Sentence length: faster from about {even:.1f} tokens per sentence on (computed from runs with sentences of "
        f"{short} and of {long} tokens)."
    )


def _text_length_break_even(
    token_system: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    report: SpeedReport,
    figures: dict[str, Any],
) -> str:
    """Time whole runs at growing lengths, half prompt and half new text; batch 1 was timed at the longest already."""
    longest = settings.prompt_tokens + settings.new_tokens
    measured = [r.total_ratio for r in report.runs if r.system == SENTENCE_MODEL and r.batch_size == 1]
    lengths = sorted({n for n in (8, 32, 96) if n < longest} | {longest})
    ratios: dict[int, float] = {}
    for length in lengths:
        if length == longest and measured and measured[0] is not None:
            ratios[length] = measured[0]
            continue
        prompts = make_prompts(sentences, length // 2, 1)
        new = length - length // 2
        times = alternate(
            [token_system, sentence_system], prompts, new, min(BREAK_EVEN_REPEATS, settings.repeats)
        )
        ratios[length] = statistics.median(theirs / mine for theirs, mine in times)
    figures["text_length_ratios"] = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in ratios.items())
    faster = [n for n, ratio in ratios.items() if ratio >= 1]
    figures["text_length_faster_from"] = min(faster, default=None)
    shown = (
        f"the backbone's time over the sentence model's, by tokens of text: {figures['text_length_ratios']}"
    )
    if len(faster) == len(lengths):
        return f"Text length: faster at every length tested ({shown})."
    if not faster:
        return f"Text length: slower at every length tested ({shown})."
    return f"Text length: faster at {', '.join(map(str, faster))} tokens of text ({shown})."


def _alternatives(best: float, lookup: Sequence[float]) -> str:
    """When something that keeps the backbone's output would be the better choice."""
    measured = f" (prompt lookup, measured here: {lookup[0]:.2f}x)" if lookup else ""
    return (
        f"Best ratio measured: {best:.2f}x; the output differs from the backbone's. Choose speculative decoding "
        f"if the output must equal the backbone's and batches are small{measured}; EAGLE-3 reports up to 6.5x at "
        "batch 1 and about 1.4x at batch 64. Choose quantization if the weights do not fit, or if you cannot train. "
        "The sentence model pays off where long texts or many requests make the cache the limit."
    )


class SweepPoint(BaseModel):
    """One batch size, prompt length and sentence length; whole runs, prefill included."""

    batch_size: int
    prompt_tokens: int
    sentence_tokens: int
    ratio: float
    """The backbone's time over the sentence model's: median over pairs measured side by side."""
    lowest: float
    highest: float
    tokens_per_second: float
    lookup_ratio: float | None = None
    """The backbone's time over its own with prompt lookup, at batch 1."""


class SpeedSweep(BaseModel):
    """A grid of points."""

    model_config = ConfigDict(populate_by_name=True)

    new_tokens: int
    repeats: int
    points: list[SweepPoint] = Field(alias="cells")


def sweep_speed(
    model: SentenceLM,
    backbone: PreTrainedModel,
    *,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    bos_token_id: int,
    prompt_tokens: Sequence[int],
    sentence_tokens: Sequence[int],
) -> SpeedSweep:
    """Time both models at every point of the grid; ``settings`` has batch sizes, new tokens and repeats.

    Raises:
        InputError: a prompt does not fit, or sentences are longer than the model writes.
    """
    longest = model.config.vae_config.max_sentence_tokens
    if max(sentence_tokens) > longest:
        raise InputError(
            f"--sentence-tokens: {max(sentence_tokens)} is over the model's limit of {longest} tokens per sentence",
            fix=f"give lengths of at most {longest}",
        )
    for prompt in prompt_tokens:
        require_positions(backbone, prompt, settings.new_tokens)
    token_system, ours = both_systems(model, backbone, sentence_tokens[:1], settings, bos_token_id)
    points = []
    with quiet_transformers():
        for size in settings.batch_sizes:
            for prompt in prompt_tokens:
                prompts = make_prompts(sentences, prompt, size)
                systems: list[System] = [token_system, *(ours.with_lengths([n]) for n in sentence_tokens)]
                if size == 1:
                    systems.append(
                        TokenSystem(LOOKUP, backbone, bos_token_id, prompt_lookup_num_tokens=LOOKUP_TOKENS)
                    )
                for system in systems[:2]:
                    system.write(prompts, settings.new_tokens)
                times = alternate(systems, prompts, settings.new_tokens, settings.repeats)
                lookup = statistics.median(t[0] / t[-1] for t in times) if size == 1 else None
                for column, length in enumerate(sentence_tokens, 1):
                    ratios = [t[0] / t[column] for t in times]
                    took = statistics.median(t[column] for t in times)
                    points.append(
                        SweepPoint(
                            batch_size=size,
                            prompt_tokens=prompt,
                            sentence_tokens=length,
                            ratio=statistics.median(ratios),
                            lowest=min(ratios),
                            highest=max(ratios),
                            tokens_per_second=size * settings.new_tokens / took,
                            lookup_ratio=lookup,
                        )
                    )
    return SpeedSweep(new_tokens=settings.new_tokens, repeats=settings.repeats, points=points)


def sweep_table(sweep: SpeedSweep) -> Table:
    """Ratios: one row per batch size and prompt length, one column per sentence length; and what to choose where."""
    lengths = sorted({point.sentence_tokens for point in sweep.points})
    found = {(p.batch_size, p.prompt_tokens, p.sentence_tokens): p for p in sweep.points}
    rows = [
        [str(size), str(prompt), *(f"{found[size, prompt, n].ratio:.2f}x" for n in lengths)]
        for size, prompt in dict.fromkeys((p.batch_size, p.prompt_tokens) for p in sweep.points)
    ]
    notes = [
        "Time of the backbone's own generate over the sentence model's: whole runs with "
        f"{sweep.new_tokens} new tokens, median of {sweep.repeats} alternating runs; one column per sentence length.",
        *sweep_advice(sweep),
    ]
    columns = ["batch", "prompt tokens", *(f"{n} per sentence" for n in lengths)]
    return Table("Speed beside the backbone", columns, rows, notes)


def sweep_advice(sweep: SpeedSweep) -> list[str]:
    """Where the break-even is, and what to choose on the other side of it."""
    slower = [point for point in sweep.points if point.ratio < 1]
    if not slower:
        lines = ["Break-even: none in this grid; the sentence model is faster everywhere."]
    else:
        listed = "; ".join(
            f"batch {p.batch_size}, prompt {p.prompt_tokens}, sentences of {p.sentence_tokens}: {p.ratio:.2f}x"
            for p in slower
        )
        lines = [f"Slower at {listed}."]
        lines.append(
            "There, use the backbone with 8-bit weights (they help most at small batches) or speculative decoding: "
            "both keep its output."
            if min(point.batch_size for point in slower) < 8
            else "There, use the backbone itself: at large batches arithmetic is the limit, not memory."
        )
    better = [p for p in sweep.points if p.lookup_ratio is not None and p.lookup_ratio > p.ratio]
    if better:
        worst = max(better, key=lambda point: (point.lookup_ratio or 0) / point.ratio)
        lines.append(
            f"Prompt lookup is faster at batch 1, prompt {worst.prompt_tokens}, sentences of {worst.sentence_tokens}: "
            f"{worst.lookup_ratio:.2f}x against {worst.ratio:.2f}x, and keeps the backbone's output."
        )
    return lines


def write_sweep(sweep: SpeedSweep, folder: Path) -> Path:
    """Write the figures into a folder; return the file. Raises StorageError."""
    path = folder / SWEEP_FILE
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sweep.model_dump_json(indent=1, by_alias=True) + "\n")
    return path
