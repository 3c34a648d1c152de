"""Samplers: each batch is a pure function of (seed, index), so that only the step number is needed to resume.

An epoch has ``batches_per_epoch`` batches; the last one may be smaller. Indexes continue across epochs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sentcompress.text.corpus import Corpus

Batch = dict[str, Tensor]

PADDING, START = -1, -2
"""Values of ``sentence_index`` at positions without a sentence: padding, and the start of a document."""
BUCKET_BATCHES = 64
"""Batches whose sentences are sorted by length together: more give less padding, fewer are more random."""
MAX_LISTED_SENTENCES = 1 << 24
"""Up to this many sentences, the order of an epoch is an array in memory; beyond, it is computed when needed."""


_ROUNDS = 4
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Shuffle:
    """A random permutation of ``0 .. count - 1``, computed entry by entry (a Feistel network).

    Args:
        count: at least 1.
        seed: integers.
    """

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self.count = count
        self.half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.default_rng(seed).integers(1 << 63, size=_ROUNDS, dtype=np.uint64)

    def __call__(self, indexes: np.ndarray) -> np.ndarray:
        """The entries of the permutation at these indexes, ``[n]`` int64."""
        values = self._mixed(indexes.astype(np.uint64))
        # The network permutes a larger, square range: follow its cycle until the value is below count.
        while (outside := values >= self.count).any():
            values[outside] = self._mixed(values[outside])
        return values.astype(np.int64)

    def _mixed(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            hashed = (right + key) * _MULTIPLIER
            hashed ^= hashed >> np.uint64(29)
            hashed *= _MULTIPLIER
            left, right = right, left ^ ((hashed >> np.uint64(32)) & self.mask)
        return (left << self.half) | right


class Epochs:
    """The orders of recent epochs, each a function of the seed and the number of the epoch."""

    def __init__(self, seed: int, make_order: Callable[[np.random.Generator], np.ndarray]) -> None:
        self.seed = seed
        self.make_order = make_order
        self._recent: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        order = self._recent.get(epoch)
        if order is None:
            order = self.make_order(np.random.default_rng([self.seed, epoch]))
            # Replaced, never changed in place: a prefetching thread may be reading it.
            self._recent = {**dict(list(self._recent.items())[-1:]), epoch: order}
        return order


class Passage(NamedTuple):
    """Consecutive sentences ``start`` to ``stop - 1`` of the corpus, all from one document.

    The first ``context`` of them are carried over from the passage before and not scored again.
    """

    document: int
    start: int
    stop: int
    context: int


class Passages(Sequence[Passage]):
    """A list of passages in one array, since a large corpus has millions."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        """``[P, 4]`` int64: document, start, stop, context."""

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> Passages: ...
    def __getitem__(self, index: int | slice) -> Passage | Passages:
        if isinstance(index, slice):
            return Passages(self.table[index])
        return Passage(*self.table[index].tolist())


def check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def pad(rows: Sequence[np.ndarray], value: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad token sequences on the right: ``input_ids [S, L]`` and ``attention_mask [S, L]``."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(width or lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, value, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class _Sentences:
    """The sentences of some documents, numbered from 0, without a list, since a large corpus has many millions."""

    def __init__(self, corpus: Corpus, documents: Sequence[int] | np.ndarray) -> None:
        chosen = np.asarray(documents, dtype=np.int64)
        self.corpus = corpus
        self.firsts = np.asarray(corpus.document_offsets[chosen])
        counts = corpus.document_offsets[chosen + 1] - self.firsts
        self.ends = np.cumsum(counts)
        self.begins = self.ends - counts

    def __len__(self) -> int:
        return int(self.ends[-1])

    def numbers(self, indexes: np.ndarray) -> np.ndarray:
        """The numbers of sentences in the corpus."""
        documents = np.searchsorted(self.ends, indexes, side="right")
        return self.firsts[documents] + indexes - self.begins[documents]

    def lengths(self, indexes: np.ndarray) -> np.ndarray:
        """The lengths of sentences in tokens."""
        offsets = self.corpus.sentence_offsets
        numbers = self.numbers(indexes)
        return np.asarray(offsets[numbers + 1]) - np.asarray(offsets[numbers])


class SentenceSampler:
    """Batches of single sentences of about the same length, so that there is little padding.

    Args:
        documents: indexes of documents of the corpus.
        sentences_per_batch: the batch size ``S``.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Sequence[int] | np.ndarray,
        sentences_per_batch: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        check_counts(documents=len(documents), sentences_per_batch=sentences_per_batch)
        self.corpus = corpus
        self.size = sentences_per_batch
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.sentences = _Sentences(corpus, documents)
        self.batches_per_epoch = -(-len(self.sentences) // self.size)
        self._epochs = Epochs(seed, self._make_order)
        self._bucket: tuple[tuple[int, int], np.ndarray] | None = None

    def _make_order(self, rng: np.random.Generator) -> np.ndarray:
        """``[batches, S]`` indexes into ``sentences``; -1 fills up the smaller batch."""
        shuffled = rng.permutation(len(self.sentences))
        step = BUCKET_BATCHES * self.size
        buckets = [shuffled[start : start + step] for start in range(0, len(shuffled), step)]
        return np.concatenate([self._batches(bucket, rng) for bucket in buckets])

    def _batches(self, bucket: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Batches of sentences of similar length, in random order: ``[batches, S]``."""
        filled = np.full(-(-len(bucket) // self.size) * self.size, -1, dtype=np.int64)
        filled[: len(bucket)] = bucket[np.argsort(self.sentences.lengths(bucket), kind="stable")]
        batches = filled.reshape(-1, self.size)
        return batches[rng.permutation(len(batches))]

    def _chosen(self, epoch: int, number: int) -> np.ndarray:
        count = len(self.sentences)
        if count <= MAX_LISTED_SENTENCES:
            return self._epochs.order(epoch)[number]
        bucket_number, number = divmod(number, BUCKET_BATCHES)
        bucket = self._bucket
        if bucket is None or bucket[0] != (epoch, bucket_number):
            start = bucket_number * BUCKET_BATCHES * self.size
            indexes = np.arange(start, min(count, start + BUCKET_BATCHES * self.size))
            members = Shuffle(count, [self.seed, epoch])(indexes)
            rng = np.random.default_rng([self.seed, epoch, bucket_number])
            bucket = self._bucket = ((epoch, bucket_number), self._batches(members, rng))
        return bucket[1][number]

    def indexes(self, index: int) -> np.ndarray:
        """The numbers of the sentences of a batch."""
        chosen = self._chosen(*divmod(index, self.batches_per_epoch))
        return self.sentences.numbers(chosen[chosen >= 0])

    def batch(self, index: int) -> Batch:
        """``input_ids [S, L]`` and ``attention_mask [S, L]``, int64, without special tokens."""
        input_ids, attention_mask = pad(
            [self.corpus.sentence(i) for i in self.indexes(index)], self.pad_token_id
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class PassageSampler:
    """Batches of passages of consecutive sentences, to train a SentenceLM.

    A document of more than ``max_sentences`` becomes several passages. Each but the first begins with the last
    ``overlap_sentences`` of the one before, as context. So every sentence is scored exactly once per epoch, except the
    first of a document, which is scored only with ``start``.

    Args:
        passages_per_batch: passages per batch; they are packed into rows.
        max_sentences: sentences per passage and per row, at most.
        overlap_sentences: at least 1, so that the first sentence of a later passage can be predicted.
        shuffle: False keeps the order of ``documents``, for evaluation.
        start: put a START position before the first sentence of each document.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Sequence[int] | np.ndarray,
        passages_per_batch: int,
        max_sentences: int,
        overlap_sentences: int,
        seed: int,
        pad_token_id: int,
        shuffle: bool = True,
        start: bool = False,
    ) -> None:
        check_counts(
            documents=len(documents),
            passages_per_batch=passages_per_batch,
            overlap_sentences=overlap_sentences,
        )
        if overlap_sentences >= max_sentences:
            raise ValueError(
                f"overlap_sentences ({overlap_sentences}) must be below max_sentences ({max_sentences})"
            )
        self.corpus = corpus
        self.size = passages_per_batch
        self.start = start
        self.row_width = max_sentences + start
        self.pad_token_id = pad_token_id
        self.passages = Passages(_cut_passages(corpus, documents, max_sentences, overlap_sentences))
        self.batches_per_epoch = -(-len(self.passages) // self.size)
        count = len(self.passages)
        self._epochs = Epochs(seed, lambda rng: rng.permutation(count) if shuffle else np.arange(count))

    def passages_of(self, index: int) -> list[Passage]:
        """The passages of a batch, in the order of their ids."""
        epoch, number = divmod(index, self.batches_per_epoch)
        chosen = self._epochs.order(epoch)[number * self.size : (number + 1) * self.size]
        return [self.passages[i] for i in chosen.tolist()]

    def batch(self, index: int) -> Batch:
        """The batch of ``SentenceLM.forward``.

        Returns:
            ``input_ids, attention_mask [S, L]`` int64: all sentences, padded on the right;
            ``sentence_index [R, N]`` int64: the sentence at each position, -1 at padding, -2 at a START position;
            ``passage_ids [R, N]`` int64: the passage at each position, -1 at padding;
            ``scored [S]`` bool: whether a sentence is a target: it has a position before it and is not context;
            ``last [S]`` bool: whether a sentence is the last of its document.
        """
        passages = self.passages_of(index)
        sentences: list[np.ndarray] = []
        scored: list[bool] = []
        last: list[bool] = []
        positions: list[list[int]] = []
        for document, start, stop, context in passages:
            begins = start == int(self.corpus.document_offsets[document])
            with_start = self.start and begins
            number = len(sentences)
            positions.append([START] * with_start + list(range(number, number + stop - start)))
            sentences += [self.corpus.sentence(i) for i in range(start, stop)]
            unscored = context if not begins else 1 - with_start
            scored += [False] * unscored + [True] * (stop - start - unscored)
            ends = stop == int(self.corpus.document_offsets[document + 1])
            last += [False] * (stop - start - 1) + [ends]
        input_ids, attention_mask = pad(sentences, self.pad_token_id)
        rows = first_fit([len(row) for row in positions], self.row_width)
        width = max(sum(len(positions[passage]) for passage in row) for row in rows)
        sentence_index = np.full((len(rows), width), PADDING, dtype=np.int64)
        passage_ids = np.full_like(sentence_index, PADDING)
        for r, row in enumerate(rows):
            column = 0
            for passage in row:
                stop = column + len(positions[passage])
                sentence_index[r, column:stop] = positions[passage]
                passage_ids[r, column:stop] = passage
                column = stop
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "sentence_index": torch.from_numpy(sentence_index),
            "passage_ids": torch.from_numpy(passage_ids),
            "scored": torch.tensor(scored),
            "last": torch.tensor(last),
        }


def _cut_passages(
    corpus: Corpus, documents: Sequence[int] | np.ndarray, max_sentences: int, overlap: int
) -> np.ndarray:
    """``[P, 4]`` int64: the fields of each :class:`Passage`, in the order of the documents."""
    table = array("q")
    for document in map(int, documents):
        sentences = corpus.document_sentences(document)
        start, context = sentences.start, 0
        while True:
            stop = min(start + max_sentences, sentences.stop)
            table.extend((document, start, stop, context))
            if stop == sentences.stop:
                break
            start, context = stop - overlap, overlap
    return np.frombuffer(table, dtype=np.int64).reshape(-1, 4)


def first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into rows of at most ``width``: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), None)
        if row is None:
            rows.append([])
            room.append(width)
            row = len(rows) - 1
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows
