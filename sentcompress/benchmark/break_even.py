"""Where the sentence model stops being faster, and when something else is the better choice."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from sentcompress.benchmark.records import SpeedReport
from sentcompress.benchmark.systems import (
    LOOKUP,
    SENTENCES,
    SentenceSystem,
    TokenSystem,
    alternate,
    make_prompts,
)
from sentcompress.recipe import BenchSettings

REPEATS = 3
"""Alternating runs of each figure here, at most."""


def break_even(
    plain: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    report: SpeedReport,
    settings: BenchSettings,
) -> tuple[dict[str, Any], list[str]]:
    """Where the sentence model stops being faster: batch size, sentence length, text length."""
    sweep = {run.batch_size: run.ratio for run in report.runs if run.system == SENTENCES and run.ratio}
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
    lines.append(_sentence_length_break_even(plain, sentence_system, sentences, settings, figures))
    lines.append(_text_length_break_even(plain, sentence_system, sentences, settings, report, figures))
    lookup = [run.ratio for run in report.runs if run.system == LOOKUP and run.ratio]
    lines.append(_elsewhere(max(sweep.values(), default=0.0), lookup))
    return figures, lines


def _sentence_length_break_even(
    plain: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    figures: dict[str, Any],
) -> str:
    """Time with short and with long sentences; seconds a token are a straight line in 1 / length."""
    longest = sentence_system.model.config.vae_config.max_sentence_tokens
    short, long = 2, min(longest, max(3, settings.new_tokens // 2, 8))
    prompts = make_prompts(sentences, settings.prompt_tokens, 1)
    new = settings.new_tokens
    systems = [plain, *(sentence_system.with_lengths([n]) for n in (short, long))]
    rounds = alternate(systems, prompts, new, min(REPEATS, settings.repeats))
    base, *ours = (statistics.median(column) / new for column in zip(*rounds, strict=True))
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
        return "Sentence length: slower however long the sentences are; a token costs the decoder too much."
    even = max(1.0, slope / (base - floor))
    figures["sentence_length_faster_from"] = even
    return (
        f"Sentence length: faster from about {even:.1f} tokens a sentence on (from runs with sentences of {short} "
        f"and of {long} tokens)."
    )


def _text_length_break_even(
    plain: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    report: SpeedReport,
    figures: dict[str, Any],
) -> str:
    """Whole runs at growing lengths, half prompt and half new text; the longest was measured at batch 1 already."""
    longest = settings.prompt_tokens + settings.new_tokens
    measured = [r.total_ratio for r in report.runs if r.system == SENTENCES and r.batch_size == 1]
    lengths = sorted({n for n in (8, 32, 96) if n < longest} | {longest})
    ratios: dict[int, float] = {}
    for length in lengths:
        if length == longest and measured and measured[0] is not None:
            ratios[length] = measured[0]
            continue
        prompts = make_prompts(sentences, length // 2, 1)
        new = length - length // 2
        rounds = alternate([plain, sentence_system], prompts, new, min(REPEATS, settings.repeats))
        ratios[length] = statistics.median(theirs / mine for theirs, mine in rounds)
    figures["text_length_ratios"] = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in ratios.items())
    faster = [n for n, ratio in ratios.items() if ratio >= 1]
    figures["text_length_faster_from"] = min(faster, default=None)
    shown = f"time of the backbone over ours by tokens of text: {figures['text_length_ratios']}"
    if len(faster) == len(lengths):
        return f"Text length: faster at every length tested ({shown})."
    if not faster:
        return f"Text length: slower at every length tested ({shown})."
    return f"Text length: faster at {', '.join(map(str, faster))} tokens of text ({shown})."


def _elsewhere(best: float, lookup: Sequence[float]) -> str:
    """When something that keeps the model's output as it is would be the better choice."""
    measured = f" (prompt lookup, measured here: {lookup[0]:.2f}x)" if lookup else ""
    return (
        f"Best ratio measured: {best:.2f}x, with other outputs than the backbone's. Choose speculative decoding "
        f"instead if the output must stay the backbone's, at small batches{measured}; EAGLE-3 reports up to 6.5x at "
        "batch 1 and about 1.4x at batch 64. Choose quantization if the weights are what does not fit, or if you "
        "cannot train. The sentence model pays where long texts or many requests make the cache the limit."
    )
