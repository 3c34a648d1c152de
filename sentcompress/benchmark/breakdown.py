"""Where the loss is: a quality figure split by position in the sentence or document, or by sentence length. No torch.

The rule: every byte of the scored text lies in one token of one sentence, cut the way the sentence model reads it.
That gives the byte its bucket, for every system. A token's nats are divided evenly among its bytes, so a token that
straddles a border between buckets counts on each side with the bytes it has there. End marks and decisions to stop or
go on stand for no bytes and have their own buckets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sentcompress.benchmark.drawing import COLORS, GREY, SENTENCE_COLOR
from sentcompress.benchmark.measurement import BASELINES, OPPONENT_SYSTEM, SENTENCE_MODEL, WITHOUT_LLM
from sentcompress.errors import CoverageError, InputError, did_you_mean
from sentcompress.provenance import Record
from sentcompress.table import Table, number, percent

if TYPE_CHECKING:
    from sentcompress.benchmark.heldout_text import HeldoutDocument
    from sentcompress.benchmark.measurements.quality import QualityScore
    from sentcompress.text.lossless_tokenizer import LosslessTokenizer

By = Literal["position", "length", "index", "bytes"]
BY: tuple[By, ...] = get_args(By)

STARTS: dict[By, tuple[int, ...]] = {
    "position": (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
    "length": (1, 2, 3, 5, 9, 13, 17, 25, 33, 41, 65, 129),
    "index": (1, 2, 3, 5, 9, 17, 33, 65, 129, 257),
    "bytes": (0, 1000, 2000, 4000, 8000, 16000, 32000, 64000),
}
"""Where buckets begin: narrow where neighbors differ most, wider after that."""
BY_TITLES: dict[By, str] = {
    "position": "Quality by position of the token in its sentence",
    "length": "Quality by tokens of the sentence",
    "index": "Quality by sentence of the document (0 is context)",
    "bytes": "Quality by bytes of the document before",
}
MARKS = ("end marks", "stop decisions")
ROUNDING = 1e-9
"""Relative difference of two sums of the same fp64 numbers in another order."""


class Bucket(Record):
    """A part of one system's nats on all held-out documents; a breakdown's buckets add up to the whole."""

    label: str
    """Range of what it is broken down by; or ``end marks`` or ``stop decisions``, which stand for no bytes."""
    bytes: int
    nats: float
    """Of its bytes alone."""
    mark_nats: float = 0.0
    """End marks and decisions of its sentences, once more: they are counted in the buckets of those names."""


def chosen(words: Sequence[str]) -> list[By]:
    """Names of breakdowns; each word is one name, or several with commas between them.

    Raises:
        InputError: one is unknown; the message suggests the nearest.
    """
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in BY:
            raise InputError(
                f"quality cannot be broken down by '{name}'.{did_you_mean(name, BY)}",
                fix=f"use {', '.join(BY)}",
            )
    return [name for name in BY if name in names]


@dataclass
class TokenScores:
    """Negative log-likelihoods of one document under one system, by token.

    Attributes:
        nats: ``[T]`` of each token of the scored text.
        sizes: ``[T]`` bytes of each.
        ends: ``[S]`` nats of the end mark of each scored sentence; None for a token-level model.
        decisions: ``[S]`` nats of the decisions scored with each.
    """

    nats: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray | None = None
    decisions: np.ndarray | None = None


def sentence_token_scores(
    document: HeldoutDocument,
    tokenizer: LosslessTokenizer,
    eos: int,
    target_nats: Sequence[tuple[np.ndarray, np.ndarray]],
    sentence_nats: np.ndarray,
    decisions: np.ndarray,
) -> TokenScores:
    """Scores of a sentence model.

    Args:
        eos: the end mark's token.
        target_nats: targets and their nats, in the order in which they were scored.
        sentence_nats: ``[N]`` of all sentences of the document, without decisions: what was summed up.
        decisions: ``[N]``.

    Raises:
        CoverageError: these are not the sentences' tokens in order, or not what was summed up.
    """
    what = f"document {document.number} ({document.source})"
    first = document.first_scored
    sentences = document.sentences[first:]
    expected = [token for ids in sentences for token in (*ids, eos)]
    targets, nats = (np.concatenate(columns) for columns in zip(*target_nats, strict=True))
    if not np.array_equal(targets, expected):
        raise CoverageError(
            f"{what}: the model does not score the sentences' tokens in their order",
            fix="leave --by out (bench.by: []): the totals do not depend on the order",
        )
    lengths = np.array([len(ids) for ids in sentences])
    last = np.cumsum(lengths + 1) - 1
    is_end = np.zeros(len(nats), dtype=bool)
    is_end[last] = True
    ends, tokens = nats[is_end], nats[~is_end]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    # A sentence's nats are an fp32 sum: its tokens take the rounding error, so that everything adds up.
    missing = sentence_nats[first:] - ends - np.bincount(owners, tokens, len(lengths))
    if np.any(np.abs(missing) > 1e-4 * np.maximum(1.0, sentence_nats[first:])):
        raise CoverageError(f"{what}: the nats of single tokens do not add up to those of their sentences")
    tokens = tokens + (missing / lengths)[owners]
    pieces = zip(sentences, document.texts[first:], strict=True)
    sizes = np.concatenate([tokenizer.byte_sizes(ids, text) for ids, text in pieces])
    return TokenScores(tokens, sizes, ends, decisions[first:])


def nats_per_byte(nats: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Divide the nats ``[T]`` of tokens of ``sizes`` bytes evenly among their bytes ``[B]``.

    The nats of a token that stands for no byte go to the byte after it (or to the last).
    """
    per_byte = np.repeat(nats / np.maximum(sizes, 1), sizes)
    if len(per_byte) == 0:
        raise CoverageError("no byte was scored")
    begins = np.minimum(np.cumsum(sizes) - sizes, len(per_byte) - 1)
    empty = sizes == 0
    np.add.at(per_byte, begins[empty], nats[empty])
    return per_byte


class Breakdown:
    """The bucket of every scored byte and of every scored sentence.

    Args:
        by: breakdowns wanted.
        documents: those that are scored, in order.
        tokenizer: it encoded the sentences.
    """

    def __init__(
        self, by: Sequence[By], documents: Sequence[HeldoutDocument], tokenizer: LosslessTokenizer
    ) -> None:
        self.by = [name for name in BY if name in by]
        bytes_at: dict[By, list[np.ndarray]] = {name: [] for name in BY}
        sentences_at: dict[By, list[int]] = {name: [] for name in ("length", "index")}
        self._sizes = [document.scored_bytes for document in documents]
        self._counts = [len(document.sentences) - document.first_scored for document in documents]
        for document in documents:
            before = len(document.context_text.encode("utf-8"))
            bytes_at["bytes"].append(np.arange(before, before + document.scored_bytes))
            for index, (ids, text) in enumerate(zip(document.sentences, document.texts, strict=True)):
                if index < document.first_scored:
                    continue  # context: not scored
                sizes = tokenizer.byte_sizes(ids, text)
                total = sum(sizes)
                bytes_at["position"].append(np.repeat(np.arange(len(ids)), sizes))
                bytes_at["length"].append(np.full(total, len(ids)))
                bytes_at["index"].append(np.full(total, index))
                sentences_at["length"].append(len(ids))
                sentences_at["index"].append(index)
        self._bytes = {name: _buckets(name, np.concatenate(found)) for name, found in bytes_at.items()}
        self._sentences = {name: _buckets(name, np.array(found)) for name, found in sentences_at.items()}

    def split(self, system: str, scores: Sequence[TokenScores], nats: float) -> dict[By, list[Bucket]]:
        """Buckets of one system that hold any bytes, then end marks and decisions if the system has them.

        Args:
            scores: of each document, in order.
            nats: the total, as it stands in the table.

        Raises:
            CoverageError: the buckets' bytes or nats are not those of the whole.
        """
        sizes = [int(score.sizes.sum()) for score in scores]
        counts = [None if score.ends is None else len(score.ends) for score in scores]
        if sizes != self._sizes or counts not in (self._counts, [None] * len(scores)):
            raise CoverageError(f"{system}: {sum(sizes)} of {sum(self._sizes)} bytes are in a bucket")
        per_byte = np.concatenate([nats_per_byte(score.nats, score.sizes) for score in scores])
        nothing = np.zeros(0)
        ends = np.concatenate([nothing, *(c.ends for c in scores if c.ends is not None)])
        stops = np.concatenate([nothing, *(c.decisions for c in scores if c.decisions is not None)])
        found: dict[By, list[Bucket]] = {}
        for name in self.by:
            count = len(STARTS[name])
            bytes_in = np.bincount(self._bytes[name], minlength=count)
            nats_in = np.bincount(self._bytes[name], per_byte, count)
            of_sentences = name in self._sentences and len(ends)
            marks = np.bincount(self._sentences[name], ends + stops, count) if of_sentences else [0.0] * count
            buckets = [
                Bucket(label=label, bytes=int(size), nats=float(inside), mark_nats=float(mark))
                for label, size, inside, mark in zip(labels(name), bytes_in, nats_in, marks, strict=True)
                if size
            ]
            if len(ends):
                sums = zip(MARKS, (ends, stops), strict=True)
                buckets += [Bucket(label=label, bytes=0, nats=float(each.sum())) for label, each in sums]
            _check(system, name, buckets, sum(self._sizes), nats)
            found[name] = buckets
        return found


def labels(by: By) -> list[str]:
    """What buckets are called: ``3``, ``4-5``, ``128+``."""
    starts = STARTS[by]
    inner = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in itertools.pairwise(starts)]
    return [*inner, f"{starts[-1]}+"]


def _buckets(by: By, values: np.ndarray) -> np.ndarray:
    return np.searchsorted(STARTS[by], values, side="right") - 1


def _check(system: str, by: By, buckets: Sequence[Bucket], size: int, nats: float) -> None:
    """Prove that the buckets add up to the whole."""
    bytes_in, nats_in = sum(b.bytes for b in buckets), math.fsum(b.nats for b in buckets)
    if bytes_in != size:
        raise CoverageError(f"{system}, by {by}: the buckets hold {bytes_in} bytes, but the text has {size}")
    if not math.isclose(nats_in, nats, rel_tol=ROUNDING):
        raise CoverageError(f"{system}, by {by}: the buckets hold {nats_in} nats, but {nats} were scored")


# ---- several systems


@dataclass
class BucketRow:
    """One bucket under all systems.

    Attributes:
        bytes: 0 for end marks and stop decisions, whose bits are per byte of all bytes.
        bits: bits per byte by system; only systems with nats in this bucket.
        ratio: of the sentence model's to the baseline's.
        with_marks: the same, end marks and decisions of the bucket's sentences included; None by position or bytes.
        gap: nats of the sentence model minus the baseline's, in bits per byte of all bytes; gaps add up.
        share: of the whole gap.
    """

    label: str
    bytes: int
    bits: dict[str, float]
    ratio: float | None = None
    with_marks: float | None = None
    gap: float | None = None
    share: float | None = None


def compare_buckets(scores: Sequence[QualityScore], by: By) -> tuple[str | None, list[BucketRow]]:
    """The baseline's name (None if there is nothing to compare), and one row per bucket, the last for the whole."""
    broken = {score.system: score for score in scores if by in score.by}
    if not broken:
        return None, []
    baseline = next((name for name in BASELINES if name in broken and SENTENCE_MODEL in broken), None)
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
        nats_of = {name: b.nats + (b.mark_nats if label == "all" else 0.0) for name, b in found.items()}
        row.bits = {name: nats / math.log(2) / (row.bytes or size) for name, nats in nats_of.items()}
        if baseline:
            over = broken[SENTENCE_MODEL].nats - broken[baseline].nats
            ours, theirs = nats_of.get(SENTENCE_MODEL, 0.0), nats_of.get(baseline, 0.0)
            row.gap = (ours - theirs) / math.log(2) / size
            row.share = (ours - theirs) / over if over else None
            row.ratio = ours / theirs if theirs else None
            if theirs and by in ("length", "index"):
                row.with_marks = (found[SENTENCE_MODEL].nats + found[SENTENCE_MODEL].mark_nats) / theirs
        rows.append(row)
    return baseline, rows


# ---- tables and figures


def by_table(scores: Sequence[QualityScore], by: By, *, explain: bool) -> Table:
    """Bits per byte by bucket; ``explain`` says below the table how bytes are counted."""
    baseline, rows = compare_buckets(scores, by)
    opponents = [score.system for score in scores if score.system.startswith(OPPONENT_SYSTEM)]
    names = (SENTENCE_MODEL, BASELINES[0], *opponents, *BASELINES[1:])
    systems = [name for name in names if any(name in row.bits for row in rows)]
    marks = any(row.with_marks is not None for row in rows)
    lines = []
    for row in rows:
        line = [row.label, number(row.bytes or None)]
        line += [number(row.bits.get(name), 4) for name in systems]
        if baseline:
            line.append(number(row.ratio))
            line += [number(row.with_marks)] if marks else []
            line += [number(row.gap, 4), percent(row.share)]
        lines.append(line)
    columns = [by, "bytes", *systems]
    notes = []
    if explain:
        notes.append(
            "Bits per byte of the bucket's bytes; for end marks and stop decisions, of all bytes. For every system, a "
            "byte belongs to the token of the sentence model that contains it, and a token's nats are divided evenly "
            "among its bytes. The buckets' bytes and nats were proven to add up to the whole."
        )
    if baseline:
        columns += ["ratio", *(["with marks"] if marks else []), "gap", "share of gap"]
    if baseline and explain:
        notes.append(
            f"Ratio to '{baseline}'. Gap: how much worse the sentence model is, in bits per byte over all bytes; "
            "gaps add up."
        )
    if marks:
        notes.append("With marks: the ratio with the end marks and decisions of these sentences.")
    return Table(BY_TITLES[by], columns, lines, notes)


def draw_by(scores: Sequence[QualityScore], by: By, figure: Any) -> None:
    """Bits per byte by bucket for each system, and where the gap to the baseline is."""
    baseline, rows = compare_buckets(scores, by)
    buckets = [row for row in rows[:-1] if row.bytes]
    positions = np.arange(len(buckets))
    count = 2 if baseline else 1
    left, *right = figure.subplots(1, count, squeeze=False, width_ratios=[3, 2][:count])[0]
    styles = iter([":", "--", "-."])  # of the systems that have no color of their own
    for depth, system in enumerate(name for name in rows[-1].bits if name != WITHOUT_LLM):
        color = COLORS.get(system, GREY)
        left.plot(
            positions,
            [row.bits[system] for row in buckets],
            color=color,
            linestyle="-" if color != GREY else next(styles, ":"),
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label=system,
            zorder=10 - depth,
        )
    left.set_xticks(positions, [row.label for row in buckets], rotation=45)
    left.set_title(f"Bits per byte by {by}")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
    for axes in right:
        names = [row.label for row in rows[:-1]]
        axes.bar(np.arange(len(names)), [row.gap for row in rows[:-1]], color=SENTENCE_COLOR, width=0.7)
        axes.set_xticks(np.arange(len(names)), names, rotation=45, ha="right")
        axes.axhline(0, color="#94a3b8", linewidth=0.8)
        axes.set_title("Where the gap is (bits per byte of all bytes)")
        axes.grid(axis="x", visible=False)
