"""Speed beside the backbone's own ``generate``: same process, prompts, dtype, threads and number of new tokens."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sentcompress.benchmark.break_even import break_even
from sentcompress.benchmark.largest_batch import full_systems
from sentcompress.benchmark.profile import profile
from sentcompress.benchmark.records import Skipped, SpeedReport, SpeedRun
from sentcompress.benchmark.systems import (
    BACKBONE,
    INT8,
    LOOKUP,
    SENTENCES,
    STATIC,
    Prompt,
    SentenceSystem,
    System,
    TokenSystem,
    both_systems,
    make_prompts,
    seconds,
)
from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.estimate.roofline import backbone_bytes_per_token, bandwidth, sentence_bytes_per_token
from sentcompress.modeling.int8 import to_int8
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings

LOOKUP_TOKENS = 10
OVERHEAD_SHARE = 0.5
"""Share of the roofline under which a report warns that overhead is what was timed."""


@dataclass
class _Timed:
    """Seconds of each repeat."""

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)


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
        sentence_lengths: the draw of lengths the sentence model is held to.
        trained: False for untrained weights; only said in the report.

    Raises:
        InputError: prompt and new tokens do not fit in the backbone's positions.
    """
    require_positions(backbone, settings.prompt_tokens, settings.new_tokens)
    longest = model.config.vae_config.max_sentence_tokens
    # The first token of a run is the prefill's; a draw for all the others, reused from its start when used up.
    lengths = [min(int(n), longest) for n in sentence_lengths]
    plain, sentence_system = both_systems(model, backbone, lengths, settings, bos_token_id)
    # What 8 bits bring without sentences, so that the one is not taken for the other.
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
    with quiet():
        for batch_size in settings.batch_sizes:
            prompts = make_prompts(sentences, settings.prompt_tokens, batch_size)
            systems: list[System] = [plain, sentence_system]
            sentence_system.head.picked = sentence_system.head.fallbacks = 0
            for name, switches in _switches(backbone, batch_size, report):
                extra = TokenSystem(name, backbone, bos_token_id, **switches)
                if _works(extra, prompts, settings.new_tokens, report):
                    systems.append(extra)
            systems += in_8_bits
            timed = _alternate(systems, prompts, settings)
            runs = [_summary(s, timed, {s.name: batch_size for s in systems}, settings) for s in systems]
            head = sentence_system.head
            ours = next(run for run in runs if run.system == SENTENCES)
            ours.fallback_rate = head.fallbacks / max(1, head.picked)
            if batch_size == 1:
                _add_roofline(runs, sentence_system, backbone, report)
            report.runs += runs
            if settings.profile:
                for system in (plain, sentence_system):
                    report.profile += profile(system, prompts, settings.new_tokens, settings.repeats)
        if settings.largest_batch:
            report.runs += _largest_batch(backbone, sentence_system, sentences, settings, bos_token_id)
        _summarize(report)
        if settings.break_even:
            report.break_even, report.advice = break_even(plain, sentence_system, sentences, report, settings)
    shares = [run.roofline_share for run in report.runs if run.roofline_share is not None]
    if shares and max(shares) < OVERHEAD_SHARE:
        report.advice.insert(
            0,
            f"Both reach under {OVERHEAD_SHARE:.0%} of the roofline: not memory but something else sets the time (the "
            "overhead of calls for small models, other work on the machine), so expect another ratio at another size.",
        )
    return report


def _largest_batch(
    backbone: PreTrainedModel,
    ours: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    settings: BenchSettings,
    bos_token_id: int,
) -> list[SpeedRun]:
    (prompt,) = make_prompts(sentences, settings.prompt_tokens, 1)
    budget = settings.memory_budget_bytes
    systems = full_systems(backbone, ours, prompt, settings.new_tokens, budget, bos_token_id)
    timed = _alternate(systems, [], settings)
    runs = [_summary(s, timed, {s.name: s.rows for s in systems}, settings) for s in systems]
    for run in runs:
        run.note = f"largest batch in {budget / 2**30:.3g} GiB of cache, the prompt read before"
    return runs


def require_positions(backbone: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse a text that is longer than the backbone's positions. Raises InputError."""
    limit = position_limit(backbone.config)
    if prompt_tokens + new_tokens + 1 > limit:
        raise InputError(
            f"bench: a prompt of {prompt_tokens} tokens and {new_tokens} new ones are over the backbone's {limit} "
            "positions",
            fix="lower bench.prompt_tokens or bench.new_tokens",
        )


def _in_8_bits(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of the backbone with all its products in 8 bits, the output head's too."""
    twin = copy.deepcopy(backbone)
    twin.set_input_embeddings(backbone.get_input_embeddings())
    to_int8(twin)
    return twin


def _summarize(report: SpeedReport) -> None:
    """The figures people ask for first, from the smallest batch."""
    runs = {run.system: run for run in reversed(report.runs)}
    base, ours = runs[BACKBONE], runs[SENTENCES]
    report.output_ratio, report.fallback_rate = ours.ratio, ours.fallback_rate
    report.roofline_share = ours.roofline_share
    if base.prefill_tokens_per_second and ours.prefill_tokens_per_second:
        report.prefill_ratio = ours.prefill_tokens_per_second / base.prefill_tokens_per_second


def _switches(
    backbone: PreTrainedModel, batch_size: int, report: SpeedReport
) -> list[tuple[str, dict[str, Any]]]:
    """The faster settings a user can switch on in ``generate``; what cannot be is said once."""
    found: list[tuple[str, dict[str, Any]]] = []
    if batch_size == 1:
        found.append((LOOKUP, {"prompt_lookup_num_tokens": LOOKUP_TOKENS}))
    if next(backbone.parameters()).device.type == "cuda":
        found.append((STATIC, {"cache_implementation": "static"}))
    reasons = {
        LOOKUP: "transformers serves batch 1 only" if batch_size > 1 else "",
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
    """Try a setting once; one that fails, or writes another number of tokens, is said and left out."""
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


def _alternate(
    systems: Sequence[System], prompts: Sequence[Prompt], settings: BenchSettings
) -> dict[str, _Timed]:
    """A B A B ...: each repeat times every system once, one right after the other, after a warm-up."""
    timed = {system.name: _Timed() for system in systems}
    for system in systems:
        written = system.write(prompts, settings.new_tokens)
        if written != settings.new_tokens:
            raise InputError(
                f"bench: '{system.name}' wrote {written} tokens instead of {settings.new_tokens}",
                fix="lower bench.new_tokens: the sentence model's context may be full",
            )
    for _ in range(settings.repeats):
        for kind, call in (
            ("prefill", lambda s: s.prefill(prompts)),
            ("first", lambda s: s.write(prompts, 1)),
            ("full", lambda s: s.write(prompts, settings.new_tokens)),
        ):
            for system in systems:
                if kind != "prefill" or system.reads:
                    getattr(timed[system.name], kind).append(seconds(system, call))
    return timed


def _summary(
    system: System, timed: dict[str, _Timed], batch_sizes: dict[str, int], settings: BenchSettings
) -> SpeedRun:
    mine, base = timed[system.name], timed[BACKBONE]
    new, batch_size = settings.new_tokens, batch_sizes[system.name]

    def rates(t: _Timed, texts: int) -> list[float]:
        if new == 1:
            return [texts / full for full in t.full]
        # The two runs are timed apart, so on a noisy machine the difference can come out tiny.
        pairs = zip(t.full, t.first, strict=True)
        return [texts * (new - 1) / max(full - first, 0.05 * full) for full, first in pairs]

    own, other = rates(mine, batch_size), rates(base, batch_sizes[BACKBONE])
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    totals = [b / a for a, b in zip(mine.full, base.full, strict=True)]
    compared = system.name != BACKBONE
    # Assisted decoding reads the prompt as plain decoding does.
    prefill = None
    if system.reads and system.name in (BACKBONE, SENTENCES):
        prefill = batch_size * settings.prompt_tokens / statistics.median(mine.prefill)
    return SpeedRun(
        system=system.name,
        batch_size=batch_size,
        prefill_tokens_per_second=prefill,
        first_token_seconds=statistics.median(mine.first),
        output_tokens_per_second=statistics.median(own),
        total_seconds=statistics.median(mine.full),
        ratio=statistics.median(ratios) if compared else None,
        ratios=ratios if compared else [],
        total_ratio=statistics.median(totals) if compared and system.reads else None,
        note=system.note,
    )


def _add_roofline(
    runs: list[SpeedRun],
    ours: SentenceSystem,
    backbone: PreTrainedModel,
    report: SpeedReport,
) -> None:
    """Share of the speed that reading weights and cache at the measured bandwidth would allow, at batch 1."""
    mean_text = report.prompt_tokens + report.new_tokens / 2
    mean_sentence = statistics.mean(ours.lengths)
    head_bytes = ours.head.bytes_read + round(ours.head.bytes_a_sentence / (mean_sentence + 1))
    needs = {
        BACKBONE: backbone_bytes_per_token(backbone, mean_text),
        SENTENCES: sentence_bytes_per_token(ours.model, mean_text, mean_sentence, head_bytes),
    }
    for run in runs:
        if run.system in needs:
            ideal = needs[run.system] / report.bandwidth_bytes_per_second
            run.roofline_share = ideal * run.output_tokens_per_second
            if run.roofline_share > 1:
                run.note = "over 1: the weights stay in the processor's cache"


class quiet:
    """transformers warns at every ``generate`` about settings that are meant as they are."""

    def __enter__(self) -> None:
        self.before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.before)
