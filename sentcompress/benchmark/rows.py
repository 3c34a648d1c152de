"""Measurements as flat rows of figures. No torch."""

from __future__ import annotations

import math
from typing import Any

from sentcompress.benchmark.results import (
    CausalityCheck,
    DataReport,
    Figure,
    MemoryReport,
    QualityScore,
    ReconstructionReport,
    SpeedRun,
)


def causality(check: CausalityCheck) -> dict[str, Figure]:
    return {
        "max_delta": check.max_delta,
        "tolerance": check.tolerance,
        "effect": check.effect,
        "passed": check.passed,
        "detail": check.detail,
    }


def quality(score: QualityScore) -> dict[str, Figure]:
    figures: dict[str, Figure] = {
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "nats": score.nats,
        "bytes": score.bytes,
        "baseline_tokens": score.baseline_tokens,
        "targets": score.targets,
    }
    for kind, nats in score.breakdown.items():
        figures[f"bits_per_byte_{kind.replace(' ', '_')}"] = nats / math.log(2) / score.bytes
    return figures


def reconstruction(report: ReconstructionReport) -> dict[str, Figure]:
    return {
        "token_accuracy": report.token_accuracy,
        "exact_sentences": report.exact_sentences,
        "teacher_forced_perplexity": report.teacher_forced_perplexity,
        "teacher_forced_exact": report.teacher_forced_exact,
        "sentences": report.sentences,
        "tokens": report.tokens,
        **report.extra,
    }


def speed(run: SpeedRun) -> dict[str, Figure]:
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
    }


def memory(report: MemoryReport) -> dict[str, Figure]:
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


def data(report: DataReport) -> dict[str, Figure]:
    plain = {k: v for k, v in report.summary.items() if isinstance(v, int | float)}
    padding = {f"padding: {name}": share for name, share in report.padding.items()}
    return {
        **plain,
        "heldout_mean_sentence_tokens": report.mean_sentence_tokens,
        "cutting_overhead": report.cutting_overhead,
        **padding,
    }


def segments(scored: dict[str, Any]) -> dict[str, Figure]:
    return {k: v for k, v in scored.items() if isinstance(v, int | float | str) and k != "segmenter"}
