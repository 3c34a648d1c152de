"""Where the loss is: a quality figure split by position in the sentence, sentence length or sentence index. No torch.

The rule: every byte of the scored text lies in one token of one sentence, cut the way the sentence model reads it.
That gives the byte its bucket, for every system. A token's nats are spread evenly over its bytes, so a token of a
token-level model that straddles a border pays on each side for the bytes it has there. End marks and decisions to
stop or go on stand for no bytes and have buckets of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sentcompress.benchmark.heldout import ByteCounter, HeldoutDocument
from sentcompress.benchmark.records import BY, Bucket, By
from sentcompress.errors import CoverageError, InputError, did_you_mean

STARTS: dict[By, tuple[int, ...]] = {
    "position": (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
    "length": (1, 2, 3, 5, 9, 13, 17, 25, 33, 41, 65, 129),
    "index": (1, 2, 3, 5, 9, 17, 33, 65, 129, 257),
}
"""Where buckets begin: fine where much changes from one to the next, about a third to twice as wide behind."""
MARKS = ("end marks", "stop decisions")
ROUNDING = 1e-9
"""Relative difference of two sums of the same fp64 numbers in another order."""


def chosen(words: Sequence[str]) -> list[By]:
    """Names of breakdowns, each word one or several with commas between them.

    Raises:
        InputError: one is unknown; the message has the nearest.
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
class Charges:
    """What one system paid in one document.

    Attributes:
        nats: ``[T]`` of each token of the scored text.
        sizes: ``[T]`` bytes of each.
        ends: ``[S]`` nats of the end mark of each scored sentence; None for a token-level model.
        decisions: ``[S]`` nats of the decisions charged with each.
    """

    nats: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray | None = None
    decisions: np.ndarray | None = None


def sentence_charges(
    document: HeldoutDocument,
    counter: ByteCounter,
    eos: int,
    paid: Sequence[tuple[np.ndarray, np.ndarray]],
    sentence_nats: np.ndarray,
    decisions: np.ndarray,
) -> Charges:
    """Charges of a sentence model.

    Args:
        eos: the end mark's token.
        paid: targets and their nats, in the order in which they were charged.
        sentence_nats: ``[N]`` of all sentences of the document, without decisions: what was summed up.
        decisions: ``[N]``.

    Raises:
        CoverageError: these are not the sentences' tokens in order, or not what was summed up.
    """
    what = f"document {document.number} ({document.source})"
    first = document.charged
    sentences = document.sentences[first:]
    expected = [token for ids in sentences for token in (*ids, eos)]
    targets, nats = (np.concatenate(columns) for columns in zip(*paid, strict=True))
    if not np.array_equal(targets, expected):
        raise CoverageError(
            f"{what}: the model does not charge for the sentences' tokens in their order",
            fix="leave --by out (bench.by: []): the totals do not depend on the order",
        )
    lengths = np.array([len(ids) for ids in sentences])
    last = np.cumsum(lengths + 1) - 1
    is_end = np.zeros(len(nats), dtype=bool)
    is_end[last] = True
    ends, tokens = nats[is_end], nats[~is_end]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    # A sentence's figure is an fp32 sum: its tokens take what that rounding left over, so that all adds up.
    missing = sentence_nats[first:] - ends - np.bincount(owners, tokens, len(lengths))
    if np.any(np.abs(missing) > 1e-4 * np.maximum(1.0, sentence_nats[first:])):
        raise CoverageError(f"{what}: what single tokens cost is not what their sentences were charged")
    tokens = tokens + (missing / lengths)[owners]
    pieces = zip(sentences, document.texts[first:], strict=True)
    sizes = np.concatenate([counter.sizes_of(ids, text) for ids, text in pieces])
    return Charges(tokens, sizes, ends, decisions[first:])


def spread(nats: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Nats of tokens ``[T]`` of ``sizes`` bytes, evenly over their bytes ``[B]``.

    A token that stands for no byte pays with the byte that follows it (or the last).
    """
    per_byte = np.repeat(nats / np.maximum(sizes, 1), sizes)
    if len(per_byte) == 0:
        raise CoverageError("no byte was charged")
    begins = np.minimum(np.cumsum(sizes) - sizes, len(per_byte) - 1)
    empty = sizes == 0
    np.add.at(per_byte, begins[empty], nats[empty])
    return per_byte


class Places:
    """The bucket of every scored byte and of every scored sentence.

    Args:
        by: breakdowns wanted.
        documents: those that are scored, in order.
        counter: of the tokenizer that sentences were cut with.
    """

    def __init__(self, by: Sequence[By], documents: Sequence[HeldoutDocument], counter: ByteCounter) -> None:
        self.by = [name for name in BY if name in by]
        bytes_at: dict[By, list[np.ndarray]] = {name: [] for name in BY}
        sentences_at: dict[By, list[int]] = {name: [] for name in ("length", "index")}
        self._sizes = [document.scored_bytes for document in documents]
        self._counts = [len(document.sentences) - document.charged for document in documents]
        for document in documents:
            for index, (ids, text) in enumerate(zip(document.sentences, document.texts, strict=True)):
                if index < document.charged:
                    continue  # context: charged to none
                sizes = counter.sizes_of(ids, text)
                total = sum(sizes)
                bytes_at["position"].append(np.repeat(np.arange(len(ids)), sizes))
                bytes_at["length"].append(np.full(total, len(ids)))
                bytes_at["index"].append(np.full(total, index))
                sentences_at["length"].append(len(ids))
                sentences_at["index"].append(index)
        self._bytes = {name: _buckets(name, np.concatenate(found)) for name, found in bytes_at.items()}
        self._sentences = {name: _buckets(name, np.array(found)) for name, found in sentences_at.items()}

    def split(self, system: str, charges: Sequence[Charges], nats: float) -> dict[By, list[Bucket]]:
        """Buckets of one system that hold any bytes; end marks and decisions behind them where it pays for them.

        Args:
            charges: of each document, in order.
            nats: the total, as it stands in the table.

        Raises:
            CoverageError: the buckets' bytes or nats are not those of the whole.
        """
        sizes = [int(charge.sizes.sum()) for charge in charges]
        counts = [None if charge.ends is None else len(charge.ends) for charge in charges]
        if sizes != self._sizes or counts not in (self._counts, [None] * len(charges)):
            raise CoverageError(f"{system}: {sum(sizes)} of {sum(self._sizes)} bytes were found in a place")
        per_byte = np.concatenate([spread(charge.nats, charge.sizes) for charge in charges])
        nothing = np.zeros(0)
        ends = np.concatenate([nothing, *(c.ends for c in charges if c.ends is not None)])
        stops = np.concatenate([nothing, *(c.decisions for c in charges if c.decisions is not None)])
        found: dict[By, list[Bucket]] = {}
        for name in self.by:
            count = len(STARTS[name])
            bytes_in = np.bincount(self._bytes[name], minlength=count)
            nats_in = np.bincount(self._bytes[name], per_byte, count)
            of_sentences = name in self._sentences and len(ends)
            marks = np.bincount(self._sentences[name], ends + stops, count) if of_sentences else [0.0] * count
            buckets = [
                Bucket(label=label, bytes=int(size), nats=float(paid), mark_nats=float(mark))
                for label, size, paid, mark in zip(labels(name), bytes_in, nats_in, marks, strict=True)
                if size
            ]
            if len(ends):
                sums = zip(MARKS, (ends, stops), strict=True)
                buckets += [Bucket(label=label, bytes=0, nats=float(paid.sum())) for label, paid in sums]
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
    """Prove that the buckets are the whole, once."""
    bytes_in, nats_in = sum(b.bytes for b in buckets), math.fsum(b.nats for b in buckets)
    if bytes_in != size:
        raise CoverageError(f"{system}, by {by}: the buckets hold {bytes_in} bytes, the text has {size}")
    if not math.isclose(nats_in, nats, rel_tol=ROUNDING):
        raise CoverageError(f"{system}, by {by}: the buckets hold {nats_in} nats, {nats} were charged")
