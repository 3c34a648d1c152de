"""Measurements as flat rows of figures. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentcompress.benchmark.records import (
    Bucket,
    By,
    CausalityCheck,
    DataReport,
    MemoryReport,
    QualityScore,
    ReconstructionReport,
    SpeedRun,
    TextReport,
    TextScore,
)
from sentcompress.table import Figure


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
    if score.cost:
        figures |= {
            "decoding_flops_per_token": score.cost.flops,
            "decoding_bytes_per_token": score.cost.bytes,
        }
    for kind, nats in score.breakdown.items():
        figures[f"bits_per_byte_{kind.replace(' ', '_')}"] = nats / math.log(2) / score.bytes
    return figures


OURS = "sentence model"
TWINS = ("baseline, equal data", "backbone, as it came")
"""What the sentence model is compared with: the first that was measured."""


@dataclass
class BucketRow:
    """One bucket under all systems.

    Attributes:
        bytes: 0 for end marks and stop decisions, whose bits are over all bytes.
        bits: bits per byte by system; only the systems that pay here.
        ratio: of the sentence model's to the twin's.
        with_marks: the same, end marks and decisions of the bucket's sentences included; None by position.
        gap: nats the sentence model pays here and the twin does not, as bits over all bytes: these add up.
        share: of the whole gap.
    """

    label: str
    bytes: int
    bits: dict[str, float]
    ratio: float | None = None
    with_marks: float | None = None
    gap: float | None = None
    share: float | None = None


def breakdown(scores: Sequence[QualityScore], by: By) -> tuple[str | None, list[BucketRow]]:
    """The twin's name (None where there is nothing to compare), and a row a bucket with the whole at the end."""
    broken = {score.system: score for score in scores if by in score.by}
    if not broken:
        return None, []
    twin = next((name for name in TWINS if name in broken and OURS in broken), None)
    size = next(iter(broken.values())).bytes
    labels = list(dict.fromkeys(bucket.label for score in broken.values() for bucket in score.by[by]))
    at = {name: {bucket.label: bucket for bucket in score.by[by]} for name, score in broken.items()}
    for name, score in broken.items():
        marks = sum(bucket.mark_nats for bucket in score.by[by])
        at[name]["all"] = Bucket(label="all", bytes=size, nats=score.nats - marks, mark_nats=marks)
    rows = []
    for label in [*labels, "all"]:
        found = {name: buckets[label] for name, buckets in at.items() if label in buckets}
        row = BucketRow(label, max(bucket.bytes for bucket in found.values()), {})
        paid = {name: b.nats + (b.mark_nats if label == "all" else 0.0) for name, b in found.items()}
        row.bits = {name: nats / math.log(2) / (row.bytes or size) for name, nats in paid.items()}
        if twin:
            over = broken[OURS].nats - broken[twin].nats
            ours, theirs = paid.get(OURS, 0.0), paid.get(twin, 0.0)
            row.gap = (ours - theirs) / math.log(2) / size
            row.share = (ours - theirs) / over if over else None
            row.ratio = ours / theirs if theirs else None
            if theirs and by != "position":
                row.with_marks = (found[OURS].nats + found[OURS].mark_nats) / theirs
        rows.append(row)
    return twin, rows


def text(score: TextScore, report: TextReport) -> dict[str, Figure]:
    figures: dict[str, Figure] = {
        "prompts": len(report.prompts),
        "new_tokens": report.new_tokens,
        "judge": report.judge or "no judge",
    }
    for suffix, intervals in (("", score.measures), ("_vs_baseline", score.differences)):
        for name, found in intervals.items():
            figures[f"{name}{suffix}"] = found.value
            figures |= {f"{name}{suffix}_low": found.low, f"{name}{suffix}_high": found.high}
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
        "fallback_rate": run.fallback_rate,
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
