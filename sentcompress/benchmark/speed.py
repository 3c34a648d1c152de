"""Speed beside the backbone's own ``generate``: same process, prompts, dtype, threads and number of new tokens."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from sentcompress.benchmark.results import Skipped, SpeedReport, SpeedRun
from sentcompress.benchmark.roofline import backbone_bytes_per_token, bandwidth, sentence_bytes_per_token
from sentcompress.errors import InputError
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import BenchSettings

BACKBONE = "backbone, KV cache"
LOOKUP = "backbone, prompt lookup"
STATIC = "backbone, static cache, compiled"
SENTENCES = "sentence model"
LOOKUP_TOKENS = 10
OVERHEAD_SHARE = 0.5
"""Share of the roofline under which a report warns that overhead is what was timed."""


@dataclass
class Prompt:
    """One prompt, the same tokens for every system: as sentences, and joined."""

    sentences: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [token for sentence in self.sentences for token in sentence]


def make_prompts(sentences: Sequence[Sequence[int]], tokens: int, count: int) -> list[Prompt]:
    """Prompts of exactly ``tokens`` tokens each, from consecutive sentences of the text, the last cut short."""
    source = itertools.cycle([list(ids) for ids in sentences])
    prompts = []
    for _ in range(count):
        left, chosen = tokens, []
        while left > 0:
            sentence = next(source)[:left]
            chosen.append(sentence)
            left -= len(sentence)
        prompts.append(Prompt(chosen))
    return prompts


@dataclass
class _Timed:
    """Seconds of each repeat."""

    prefill: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)


class _System:
    """Something that continues prompts."""

    name: str
    note = ""

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        """Read the prompts."""

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        """Write ``new_tokens`` for each; return how many were written for the shortest."""
        raise NotImplementedError


class TokenSystem(_System):
    """The backbone in transformers ``generate``, greedy."""

    def __init__(self, name: str, model: PreTrainedModel, bos_token_id: int, **switches: Any) -> None:
        self.name, self.model, self.bos, self.switches = name, model.eval(), bos_token_id, switches
        self.device = next(model.parameters()).device

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        ids = torch.tensor([[self.bos, *prompt.tokens] for prompt in prompts], device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.model(**self._inputs(prompts), use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        inputs = self._inputs(prompts)
        output = self.model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.model.config.pad_token_id,
            **self.switches,
        )
        return int(output.shape[1] - inputs["input_ids"].shape[1])


class SentenceSystem(_System):
    """The SentenceLM with forced sentence lengths, so that the number of new tokens is the same."""

    name = SENTENCES

    def __init__(self, model: SentenceLM, sentence_lengths: Sequence[int]) -> None:
        self.model = model.eval()
        self.lengths = tuple(sentence_lengths)
        self.generator = SentenceGenerator(model, None)

    def prefill(self, prompts: Sequence[Prompt]) -> None:
        self.generator.prefill([prompt.sentences for prompt in prompts])

    def write(self, prompts: Sequence[Prompt], new_tokens: int) -> int:
        settings = GenerationSettings(
            max_new_tokens=new_tokens, stop_threshold=1, sentence_lengths=self.lengths
        )
        written = [0] * len(prompts)
        for number, sentence in self.generator.continue_sentences([p.sentences for p in prompts], settings):
            written[number] += len(sentence)
        return min(written)


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
    limit = int(backbone.config.max_position_embeddings)
    wanted = settings.prompt_tokens + settings.new_tokens + 1
    if wanted > limit:
        raise InputError(
            f"bench: a prompt of {settings.prompt_tokens} tokens and {settings.new_tokens} new ones are over the "
            f"backbone's {limit} positions",
            fix="lower bench.prompt_tokens or bench.new_tokens",
        )
    longest = model.config.vae_config.max_sentence_tokens
    # The first token of a run is the prefill's; a draw for all the others, reused from its start when used up.
    lengths = [min(int(n), longest) for n in sentence_lengths]
    sentence_system = SentenceSystem(model, lengths)
    plain = TokenSystem(BACKBONE, backbone, bos_token_id)
    report = SpeedReport(
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        trained=trained,
        sentence_lengths=lengths,
        bandwidth_bytes_per_second=bandwidth(next(model.parameters()).device),
        runs=[],
    )
    with _quiet():
        for batch_size in settings.batch_sizes:
            prompts = make_prompts(sentences, settings.prompt_tokens, batch_size)
            systems: list[_System] = [plain, sentence_system]
            for name, switches in _switches(backbone, batch_size, report):
                extra = TokenSystem(name, backbone, bos_token_id, **switches)
                if _works(extra, prompts, settings.new_tokens, report):
                    systems.append(extra)
            timed = _alternate(systems, prompts, settings)
            runs = [_summary(s, timed, batch_size, settings) for s in systems]
            if batch_size == 1:
                _add_roofline(runs, model, backbone, lengths, report)
            report.runs += runs
        report.break_even, report.advice = _break_even(
            plain, sentence_system, sentences, report, settings, limit
        )
    shares = [run.roofline_share for run in report.runs if run.roofline_share is not None]
    if shares and max(shares) < OVERHEAD_SHARE:
        report.advice.insert(
            0,
            f"Both reach under {OVERHEAD_SHARE:.0%} of the roofline: at this size it is mostly the overhead of calls "
            "that is timed, not the models' arithmetic, and the ratio says little about larger models.",
        )
    return report


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
    systems: Sequence[_System], prompts: Sequence[Prompt], settings: BenchSettings
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
                getattr(timed[system.name], kind).append(_seconds(system, call))
    return timed


def _seconds(system: _System, call: Callable[[Any], Any]) -> float:
    _synchronize(system)
    began = time.perf_counter()
    call(system)
    _synchronize(system)
    return time.perf_counter() - began


def _synchronize(system: Any) -> None:
    if next(system.model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()


def _summary(system: _System, timed: dict[str, _Timed], batch_size: int, settings: BenchSettings) -> SpeedRun:
    mine, base = timed[system.name], timed[BACKBONE]
    new = settings.new_tokens

    def rates(t: _Timed) -> list[float]:
        if new == 1:
            return [batch_size / full for full in t.full]
        # The two runs are timed apart, so on a noisy machine the difference can come out tiny.
        pairs = zip(t.full, t.first, strict=True)
        return [batch_size * (new - 1) / max(full - first, 0.05 * full) for full, first in pairs]

    own, other = rates(mine), rates(base)
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    totals = [b / a for a, b in zip(mine.full, base.full, strict=True)]
    compared = system.name != BACKBONE
    # Assisted decoding reads the prompt as plain decoding does.
    prefill = batch_size * settings.prompt_tokens / statistics.median(mine.prefill)
    return SpeedRun(
        system=system.name,
        batch_size=batch_size,
        prefill_tokens_per_second=prefill if system.name in (BACKBONE, SENTENCES) else None,
        first_token_seconds=statistics.median(mine.first),
        output_tokens_per_second=statistics.median(own),
        total_seconds=statistics.median(mine.full),
        ratio=statistics.median(ratios) if compared else None,
        ratios=ratios if compared else [],
        total_ratio=statistics.median(totals) if compared else None,
        note=system.note,
    )


def _add_roofline(
    runs: list[SpeedRun],
    model: SentenceLM,
    backbone: PreTrainedModel,
    lengths: Sequence[int],
    report: SpeedReport,
) -> None:
    """Share of the speed that reading weights and cache at the measured bandwidth would allow, at batch 1."""
    mean_text = report.prompt_tokens + report.new_tokens / 2
    needs = {
        BACKBONE: backbone_bytes_per_token(backbone, mean_text),
        SENTENCES: sentence_bytes_per_token(model, mean_text, statistics.mean(lengths)),
    }
    for run in runs:
        if run.system in needs:
            ideal = needs[run.system] / report.bandwidth_bytes_per_second
            run.roofline_share = ideal * run.output_tokens_per_second
            if run.roofline_share > 1:
                run.note = "over 1: the weights stay in the processor's cache"


def _break_even(
    plain: TokenSystem,
    sentence_system: SentenceSystem,
    sentences: Sequence[Sequence[int]],
    report: SpeedReport,
    settings: BenchSettings,
    limit: int,
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
    lines.append(_text_length_break_even(plain, sentence_system, sentences, settings, limit, figures))
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
    cost = {
        n: _median_seconds(SentenceSystem(sentence_system.model, [n]), prompts, new, settings) / new
        for n in (short, long)
    }
    base = _median_seconds(plain, prompts, new, settings) / new
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
    limit: int,
    figures: dict[str, Any],
) -> str:
    """Whole runs, half prompt and half new text, at growing lengths."""
    most = min(limit - 1, max(16, settings.prompt_tokens + settings.new_tokens))
    lengths = sorted({8, 32, 96, most} - {n for n in (8, 32, 96) if n > most})
    ratios: dict[int, float] = {}
    for length in lengths:
        prompts = make_prompts(sentences, length // 2, 1)
        new = length - length // 2
        mine = _median_seconds(sentence_system, prompts, new, settings)
        ratios[length] = _median_seconds(plain, prompts, new, settings) / mine
    figures["text_length_ratios"] = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in ratios.items())
    faster = [n for n, ratio in ratios.items() if ratio >= 1]
    figures["text_length_faster_from"] = min(faster, default=None)
    shown = f"time of the backbone over ours by tokens of text: {figures['text_length_ratios']}"
    if len(faster) == len(lengths):
        return f"Text length: faster at every length tested ({shown})."
    if not faster:
        return f"Text length: slower at every length tested ({shown})."
    return f"Text length: faster at {', '.join(map(str, faster))} tokens of text ({shown})."


def _median_seconds(
    system: _System, prompts: Sequence[Prompt], new_tokens: int, settings: BenchSettings
) -> float:
    repeats = min(3, settings.repeats)
    return statistics.median(_seconds(system, lambda s: s.write(prompts, new_tokens)) for _ in range(repeats))


def _elsewhere(best: float, lookup: Sequence[float]) -> str:
    """When something that keeps the model's output as it is would be the better choice."""
    measured = f" (prompt lookup, measured here: {lookup[0]:.2f}x)" if lookup else ""
    return (
        f"Best ratio measured: {best:.2f}x, with other outputs than the backbone's. Choose speculative decoding "
        f"instead if the output must stay the backbone's, at small batches{measured}; EAGLE-3 reports up to 6.5x at "
        "batch 1 and about 1.4x at batch 64. Choose quantization if the weights are what does not fit, or if you "
        "cannot train. The sentence model pays where long texts or many requests make the cache the limit."
    )


class _quiet:
    """transformers warns at every ``generate`` about settings that are meant as they are."""

    def __enter__(self) -> None:
        self.before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.before)
