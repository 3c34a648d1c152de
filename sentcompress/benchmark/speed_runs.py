"""Speed beside the backbone's own ``generate``: same process, prompts, dtype, threads and number of new tokens."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sentcompress.benchmark.break_even import break_even
from sentcompress.benchmark.measurement import SENTENCE_MODEL
from sentcompress.benchmark.measurements.speed import SpeedReport, SpeedRun
from sentcompress.benchmark.profile import profile
from sentcompress.benchmark.results import Skipped
from sentcompress.benchmark.throughput import largest_batches
from sentcompress.benchmark.timing import (
    BACKBONE,
    INT8,
    LOOKUP,
    LOOKUP_TOKENS,
    STATIC,
    Prompt,
    SentenceSystem,
    System,
    TokenSystem,
    both_systems,
    make_prompts,
    quiet_transformers,
    require_positions,
    seconds,
)
from sentcompress.errors import InputError
from sentcompress.estimate.roofline import backbone_bytes_per_token, bandwidth, sentence_bytes_per_token
from sentcompress.modeling.int8 import to_int8
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings

OVERHEAD_SHARE = 0.5
"""Share of the roofline below which a report warns that overhead sets the time."""


@dataclass
class RunSeconds:
    """One system's seconds, by repeat.

    Attributes:
        first: runs that write one token.
        whole: runs that write all tokens.
    """

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


def measure_speed(
    model: SentenceLM,
    backbone: PreTrainedModel,
    *,
    sentences: Sequence[Sequence[int]],
    sentence_lengths: Sequence[int],
    settings: BenchSettings,
    trained: bool,
    bos_token_id: int,
) -> SpeedReport:
    """Time the sentence model against its backbone, alternating, at each batch size of the recipe.

    Args:
        sentences: held-out text (or random tokens) to make prompts of.
        sentence_lengths: forced lengths of the sentences the sentence model writes.
        trained: False for untrained weights; used only in the report.

    Raises:
        InputError: prompt and new tokens exceed the backbone's positions.
    """
    require_positions(backbone, settings.prompt_tokens, settings.new_tokens)
    longest = model.config.vae_config.max_sentence_tokens
    # Lengths of all sentences after the prompt; they start over when used up.
    lengths = [min(int(n), longest) for n in sentence_lengths]
    token_system, sentence_system = both_systems(model, backbone, lengths, settings, bos_token_id)
    # What 8 bits bring without sentences, so that the two effects can be told apart.
    in_8_bits = [TokenSystem(INT8, _in_8_bits(backbone), bos_token_id)] if settings.quantize else []
    report = SpeedReport(
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        trained=trained,
        sentence_lengths=lengths,
        bandwidth_bytes_per_second=bandwidth(next(model.parameters()).device),
        head=sentence_system.head.kind,
        quantized=list(settings.quantize),
        runs=[],
    )
    with quiet_transformers():
        for batch_size in settings.batch_sizes:
            prompts = make_prompts(sentences, settings.prompt_tokens, batch_size)
            faster = _faster_systems(token_system, prompts, settings.new_tokens, report)
            runs = _runs(token_system, sentence_system, [*faster, *in_8_bits], prompts, settings)
            if batch_size == 1:
                _add_roofline(runs, sentence_system, backbone, report)
            report.runs += runs
            if settings.profile:
                for system in (token_system, sentence_system):
                    report.profile += profile(system, prompts, settings.new_tokens, settings.repeats)
        if settings.largest_batch:
            report.runs += _largest_batch_runs(backbone, sentence_system, sentences, settings, bos_token_id)
        _summarize(report)
        if settings.break_even:
            report.break_even, report.advice = break_even(
                token_system, sentence_system, sentences, report, settings
            )
    shares = [run.roofline_share for run in report.runs if run.roofline_share is not None]
    if shares and max(shares) < OVERHEAD_SHARE:
        report.advice.insert(
            0,
            f"Both reach less than {OVERHEAD_SHARE:.0%} of the roofline. They are limited by overhead (many small "
            "calls, other work on the machine), not by memory: expect a different ratio at other sizes.",
        )
    return report


def _runs(
    token_system: TokenSystem,
    sentence_system: SentenceSystem,
    others: Sequence[TokenSystem],
    prompts: Sequence[Prompt],
    settings: BenchSettings,
) -> list[SpeedRun]:
    """Time all systems on the same prompts."""
    systems: list[System] = [token_system, sentence_system, *others]
    head = sentence_system.head
    head.picked = head.fallbacks = 0
    timed = time_in_turns(systems, prompts, settings)
    batch_sizes = {system.name: len(prompts) for system in systems}
    runs = [_summary(system, timed, batch_sizes, settings) for system in systems]
    ours = next(run for run in runs if run.system == SENTENCE_MODEL)
    ours.fallback_rate = head.fallbacks / max(1, head.picked)
    return runs


def _largest_batch_runs(
    backbone: PreTrainedModel,
    ours: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    bos_token_id: int,
) -> list[SpeedRun]:
    (prompt,) = make_prompts(sentences, settings.prompt_tokens, 1)
    budget = settings.memory_budget_bytes
    systems = largest_batches(backbone, ours, prompt, settings.new_tokens, budget, bos_token_id)
    timed = time_in_turns(systems, [], settings)
    runs = [_summary(s, timed, {s.name: s.batch_size for s in systems}, settings) for s in systems]
    for run in runs:
        run.note = f"largest batch in {budget / 2**30:.3g} GiB of cache, prompt already read"
    return runs


def _in_8_bits(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of the backbone with all its products in 8 bits, including the output head's."""
    converted = copy.deepcopy(backbone)
    converted.set_input_embeddings(backbone.get_input_embeddings())
    to_int8(converted)
    return converted


def _summarize(report: SpeedReport) -> None:
    """Set the report's headline figures, from the smallest batch."""
    runs = {run.system: run for run in reversed(report.runs)}
    base, ours = runs[BACKBONE], runs[SENTENCE_MODEL]
    report.output_ratio, report.fallback_rate = ours.ratio, ours.fallback_rate
    report.roofline_share = ours.roofline_share
    if base.prefill_tokens_per_second and ours.prefill_tokens_per_second:
        report.prefill_ratio = ours.prefill_tokens_per_second / base.prefill_tokens_per_second


def _faster_systems(
    token_system: TokenSystem, prompts: Sequence[Prompt], new_tokens: int, report: SpeedReport
) -> list[TokenSystem]:
    """The backbone with options of ``generate`` that make it faster; those that fail are reported."""
    backbone, bos = token_system.model, token_system.bos
    systems = [
        TokenSystem(name, backbone, bos, **options)
        for name, options in _faster_options(backbone, len(prompts), report)
    ]
    return [system for system in systems if _works(system, prompts, new_tokens, report)]


def _faster_options(
    backbone: PreTrainedModel, batch_size: int, report: SpeedReport
) -> list[tuple[str, dict[str, Any]]]:
    """Options of ``generate`` that make the backbone faster; those that cannot be used here are reported once."""
    found: list[tuple[str, dict[str, Any]]] = []
    if batch_size == 1:
        found.append((LOOKUP, {"prompt_lookup_num_tokens": LOOKUP_TOKENS}))
    if next(backbone.parameters()).device.type == "cuda":
        found.append((STATIC, {"cache_implementation": "static"}))
    reasons = {
        LOOKUP: "transformers supports it at batch size 1 only" if batch_size > 1 else "",
        STATIC: "on a CPU, generate does not compile with a static cache" if len(found) < 2 else "",
    }
    for name, reason in reasons.items():
        missing = name not in [n for n, _ in found]
        if (
            missing
            and reason
            and not any(s.what.startswith(name) and s.reason == reason for s in report.skipped)
        ):
            report.skipped.append(Skipped(part="speed", what=name, reason=reason))
    return found


def _works(system: TokenSystem, prompts: Sequence[Prompt], new_tokens: int, report: SpeedReport) -> bool:
    """Try a system once; if it fails or writes another number of tokens, report that and return False."""
    what = f"{system.name}, batch {len(prompts)}"
    try:
        written = system.write(prompts, new_tokens)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        report.skipped.append(Skipped(part="speed", what=what, reason=reason))
        return False
    if written != new_tokens:
        reason = f"wrote {written} tokens instead of {new_tokens}"
        report.skipped.append(Skipped(part="speed", what=what, reason=reason))
    return written == new_tokens


def time_in_turns(
    systems: Sequence[System], prompts: Sequence[Prompt], settings: BenchSettings
) -> dict[str, RunSeconds]:
    """A B A B ...: after a warm-up, each repeat times every system once, one right after the other."""
    timed = {system.name: RunSeconds() for system in systems}
    for system in systems:
        written = system.write(prompts, settings.new_tokens)
        if written != settings.new_tokens:
            raise InputError(
                f"bench: '{system.name}' wrote {written} tokens instead of {settings.new_tokens}",
                fix="lower bench.new_tokens: the sentence model's context may be full",
            )
    calls: dict[str, Callable[[System], Any]] = {
        "prefill": lambda system: system.prefill(prompts),
        "first": lambda system: system.write(prompts, 1),
        "whole": lambda system: system.write(prompts, settings.new_tokens),
    }
    for _ in range(settings.repeats):
        for kind, call in calls.items():
            for system in systems:
                if kind != "prefill" or system.reads_prompts:
                    getattr(timed[system.name], kind).append(seconds(system, call))
    return timed


def _summary(
    system: System, timed: dict[str, RunSeconds], batch_sizes: dict[str, int], settings: BenchSettings
) -> SpeedRun:
    """Medians of one system, and its ratios to the backbone's run beside it."""
    mine, base = timed[system.name], timed[BACKBONE]
    new, batch_size = settings.new_tokens, batch_sizes[system.name]

    def rates(took: RunSeconds, texts: int) -> list[float]:
        if new == 1:
            return [texts / whole for whole in took.whole]
        # The two runs are timed separately, so on a noisy machine the difference can be tiny.
        pairs = zip(took.whole, took.first, strict=True)
        return [texts * (new - 1) / max(whole - first, 0.05 * whole) for whole, first in pairs]

    own, other = rates(mine, batch_size), rates(base, batch_sizes[BACKBONE])
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    totals = [b / a for a, b in zip(mine.whole, base.whole, strict=True)]
    compared = system.name != BACKBONE
    # Assisted decoding reads the prompt as ordinary decoding does.
    prefill = None
    if system.reads_prompts and system.name in (BACKBONE, SENTENCE_MODEL):
        prefill = batch_size * settings.prompt_tokens / statistics.median(mine.prefill)
    return SpeedRun(
        system=system.name,
        batch_size=batch_size,
        prefill_tokens_per_second=prefill,
        first_token_seconds=statistics.median(mine.first),
        output_tokens_per_second=statistics.median(own),
        total_seconds=statistics.median(mine.whole),
        ratio=statistics.median(ratios) if compared else None,
        ratios=ratios if compared else [],
        total_ratio=statistics.median(totals) if compared and system.reads_prompts else None,
        note=system.note,
    )


def _add_roofline(
    runs: list[SpeedRun],
    ours: SentenceSystem,
    backbone: PreTrainedModel,
    report: SpeedReport,
) -> None:
    """Add the share of the speed that reading weights and cache at the measured bandwidth allows, at batch 1."""
    mean_text = report.prompt_tokens + report.new_tokens / 2
    mean_sentence = statistics.mean(ours.lengths)
    head_bytes = ours.head.bytes_read + round(ours.head.bytes_per_sentence / (mean_sentence + 1))
    bytes_per_token = {
        BACKBONE: backbone_bytes_per_token(backbone, mean_text),
        SENTENCE_MODEL: sentence_bytes_per_token(ours.model, mean_text, mean_sentence, head_bytes),
    }
    for run in runs:
        if run.system in bytes_per_token:
            ideal_seconds = bytes_per_token[run.system] / report.bandwidth_bytes_per_second
            run.roofline_share = ideal_seconds * run.output_tokens_per_second
            if run.roofline_share > 1:
                run.note = "over 1: the weights stay in the processor's cache"
