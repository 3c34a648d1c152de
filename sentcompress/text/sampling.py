"""Samplers: batches as a pure function of (seed, index), so that resuming needs the step number only.

An epoch is ``batches_per_epoch`` batches; the last one of an epoch may be smaller. Indexes go on for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sentcompress.text.corpus import Corpus
from sentcompress.text.whole import open_whole

Batch = dict[str, Tensor]

IGNORED = -100
"""Label of a position that is no target (the convention of transformers)."""
PADDING, START = -1, -2
"""Cells of ``sentence_index`` that hold no sentence: padding, and the start of a document."""
BUCKET_BATCHES = 64
"""Batches whose sentences are sorted by length together: many for little padding, few to stay random."""


class Passage(NamedTuple):
    """Consecutive sentences ``start`` to ``stop - 1`` of the corpus, of one document.

    The first ``context`` of them were targets of the passage before and are carried over, not scored again.
    """

    document: int
    start: int
    stop: int
    context: int


class Passages(Sequence[Passage]):
    """A list of passages, kept as one array (a large corpus has millions)."""

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


class _Epochs:
    """The orders of recent epochs, each a function of the seed and its number."""

    def __init__(self, seed: int, make_order: Callable[[np.random.Generator], np.ndarray]) -> None:
        self.seed = seed
        self.make_order = make_order
        self._recent: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        order = self._recent.get(epoch)
        if order is None:
            order = self.make_order(np.random.default_rng([self.seed, epoch]))
            # Replaced whole, never changed: a prefetching thread may be reading it.
            self._recent = {**dict(list(self._recent.items())[-1:]), epoch: order}
        return order


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _pad(rows: Sequence[np.ndarray], value: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of tokens to ``input_ids [S, L]`` and ``attention_mask [S, L]``, padded on the right."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(width or lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, value, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _sentences_of(corpus: Corpus, documents: Sequence[int] | np.ndarray) -> np.ndarray:
    ranges = [corpus.document_sentences(int(document)) for document in documents]
    return np.concatenate([np.arange(r.start, r.stop) for r in ranges])


class SentenceSampler:
    """Single sentences, those of a batch of about the same length, so that there is little padding.

    Args:
        documents: indexes of documents of the corpus.
        sentences_per_batch: ``S``.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Sequence[int] | np.ndarray,
        sentences_per_batch: int,
        seed: int,
        pad_token_id: int,
    ) -> None:
        _check_counts(documents=len(documents), sentences_per_batch=sentences_per_batch)
        self.corpus = corpus
        self.size = sentences_per_batch
        self.pad_token_id = pad_token_id
        self.sentences = _sentences_of(corpus, documents)
        self._lengths = np.asarray(corpus.sentence_lengths)[self.sentences]
        self.batches_per_epoch = -(-len(self.sentences) // self.size)
        self._epochs = _Epochs(seed, self._make_order)

    def _make_order(self, rng: np.random.Generator) -> np.ndarray:
        """``[batches, S]`` indexes into ``sentences``; -1 fills the one smaller batch."""
        shuffled = rng.permutation(len(self.sentences))
        filled = np.full(self.batches_per_epoch * self.size, -1, dtype=np.int64)
        step = BUCKET_BATCHES * self.size
        for start in range(0, len(shuffled), step):
            bucket = shuffled[start : start + step]
            filled[start : start + len(bucket)] = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            batches = filled[start : start + step].reshape(-1, self.size)
            batches[:] = batches[rng.permutation(len(batches))]
        return filled.reshape(-1, self.size)

    def indexes(self, index: int) -> np.ndarray:
        """Numbers of the sentences of a batch."""
        epoch, place = divmod(index, self.batches_per_epoch)
        chosen = self._epochs.order(epoch)[place]
        return self.sentences[chosen[chosen >= 0]]

    def batch(self, index: int) -> Batch:
        """``input_ids [S, L]`` and ``attention_mask [S, L]``, int64, without special tokens."""
        input_ids, attention_mask = _pad(
            [self.corpus.sentence(i) for i in self.indexes(index)], self.pad_token_id
        )
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class PassageSampler:
    """Passages of consecutive sentences: what a SentenceLM is trained on.

    A document of more than ``max_sentences`` becomes several passages; each but the first begins with the
    last ``overlap_sentences`` of the one before, as context. So in an epoch every sentence is
    scored exactly once, except a document's first, which is scored only where there are start cells.

    Args:
        passages_per_batch: passages a batch, packed into rows.
        max_sentences: sentences a passage, and a row.
        overlap_sentences: at least 1, or the first sentence of a later passage could not be predicted.
        shuffle: False keeps the order of ``documents``, for evaluation.
        start: put a START cell before the first sentence of each document.
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
        _check_counts(
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
        self._epochs = _Epochs(seed, lambda rng: rng.permutation(count) if shuffle else np.arange(count))

    def passages_of(self, index: int) -> list[Passage]:
        """The passages of a batch, in the order of their ids."""
        epoch, place = divmod(index, self.batches_per_epoch)
        chosen = self._epochs.order(epoch)[place * self.size : (place + 1) * self.size]
        return [self.passages[i] for i in chosen.tolist()]

    def batch(self, index: int) -> Batch:
        """The batch of ``SentenceLM.forward``.

        Returns:
            ``input_ids, attention_mask [S, L]`` int64: all sentences, padded on the right;
            ``sentence_index [R, N]`` int64: sentence of each cell, -1 at padding, -2 at a START cell;
            ``passage_ids [R, N]`` int64: passage of each cell, -1 at padding;
            ``scored [S]`` bool: targets, neither the first of their passage nor carried over as context;
            ``last [S]`` bool: the last of their document.
        """
        passages = self.passages_of(index)
        sentences: list[np.ndarray] = []
        scored: list[bool] = []
        last: list[bool] = []
        cells: list[list[int]] = []
        for document, start, stop, context in passages:
            begins = start == int(self.corpus.document_offsets[document])
            with_start = self.start and begins
            number = len(sentences)
            cells.append([START] * with_start + list(range(number, number + stop - start)))
            sentences += [self.corpus.sentence(i) for i in range(start, stop)]
            unscored = context if not begins else 1 - with_start
            scored += [False] * unscored + [True] * (stop - start - unscored)
            ends = stop == int(self.corpus.document_offsets[document + 1])
            last += [False] * (stop - start - 1) + [ends]
        input_ids, attention_mask = _pad(sentences, self.pad_token_id)
        rows = _first_fit([len(row) for row in cells], self.row_width)
        width = max(sum(len(cells[passage]) for passage in row) for row in rows)
        sentence_index = np.full((len(rows), width), PADDING, dtype=np.int64)
        passage_ids = np.full_like(sentence_index, PADDING)
        for r, row in enumerate(rows):
            column = 0
            for passage in row:
                stop = column + len(cells[passage])
                sentence_index[r, column:stop] = cells[passage]
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
    """``[P, 4]`` int64 rows of :class:`Passage`, in the order of the documents."""
    table = []
    for document in map(int, documents):
        sentences = corpus.document_sentences(document)
        start, context = sentences.start, 0
        while True:
            stop = min(start + max_sentences, sentences.stop)
            table.append((document, start, stop, context))
            if stop == sentences.stop:
                break
            start, context = stop - overlap, overlap
    return np.array(table, dtype=np.int64)


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack items into rows of at most ``width``: the longest first, each into the first row it fits."""
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


class TokenSampler:
    """Documents tokenized whole, each ended by ``eos``, one after the other, cut into equal sequences.

    The documents' order changes every epoch, and so do the cuts.
    """

    def __init__(
        self,
        corpus: Corpus,
        documents: Sequence[int] | np.ndarray,
        sequence_length: int,
        sequences_per_batch: int,
        seed: int,
        eos_token_id: int,
    ) -> None:
        _check_counts(
            documents=len(documents), sequence_length=sequence_length, sequences_per_batch=sequences_per_batch
        )
        self._whole = open_whole(corpus)
        self.documents = np.asarray(documents, dtype=np.int64)
        self.length = sequence_length
        self.size = sequences_per_batch
        self.eos_token_id = eos_token_id
        self._lengths = np.diff(self._whole.offsets)[self.documents] + 1  # with eos
        self.sequences = -(-int(self._lengths.sum()) // self.length)
        self.batches_per_epoch = -(-self.sequences // self.size)
        self._documents = _Epochs(seed, lambda rng: rng.permutation(len(self.documents)))
        # Neighbouring sequences of one long document should not make up a batch.
        self._sequences = _Epochs(seed + 1, lambda rng: rng.permutation(self.sequences))

    def batch(self, index: int) -> Batch:
        """``input_ids, attention_mask, labels [B, T]`` int64; only an epoch's last sequence has padding."""
        epoch, place = divmod(index, self.batches_per_epoch)
        order = self._documents.order(epoch)
        ends = np.cumsum(self._lengths[order])
        chosen = self._sequences.order(epoch)[place * self.size : (place + 1) * self.size]
        rows = [self._read(order, ends, int(i) * self.length) for i in chosen]
        input_ids, attention_mask = _pad(rows, self.eos_token_id, self.length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(attention_mask == 0, IGNORED),
        }

    def _read(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """Up to ``sequence_length`` tokens of the epoch's stream from position ``start``."""
        parts: list[np.ndarray] = []
        stop = min(start + self.length, int(ends[-1]))
        while start < stop:
            at = int(np.searchsorted(ends, start, side="right"))
            document = int(self.documents[order[at]])
            offset = start - (int(ends[at]) - int(self._lengths[order[at]]))
            begin, end = self._whole.offsets[document : document + 2].tolist()
            wanted = stop - start
            tokens = self._whole.tokens[begin + offset : min(end, begin + offset + wanted)].astype(np.int64)
            if len(tokens) < wanted:
                tokens = np.append(tokens, self.eos_token_id)
            parts.append(tokens)
            start += len(tokens)
        return np.concatenate(parts)


class PassageTokenSampler:
    """The passages of a :class:`PassageSampler` as rows of tokens, for the equal-data baseline.

    A passage's text is tokenized whole, as a token-level model is used; one of more than ``max_length``
    tokens becomes several rows. Text that was carried over as context is read but not scored.

    Args:
        max_length: ``T`` at most.
        bos: put before each row, or None.
        eos: put after a document's last passage, or None.
    """

    def __init__(
        self,
        passage_sampler: PassageSampler,
        max_length: int,
        pad_token_id: int,
        bos: int | None,
        eos: int | None = None,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {max_length}")
        self.passage_sampler = passage_sampler
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.bos, self.eos = bos, eos
        self.batches_per_epoch = passage_sampler.batches_per_epoch

    def batch(self, index: int) -> Batch:
        """``input_ids, attention_mask, labels [B, T]`` int64; labels are -100 at bos, padding and context."""
        rows: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        head = [] if self.bos is None else [self.bos]
        step = self.max_length - len(head)
        for passage in self.passage_sampler.passages_of(index):
            ids, targets = self._tokens(passage)
            for start in range(0, len(ids), step):
                rows.append(np.array(head + ids[start : start + step], dtype=np.int64))
                labels.append(np.array([IGNORED] * len(head) + targets[start : start + step], dtype=np.int64))
        input_ids, attention_mask = _pad(rows, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": _pad(labels, IGNORED)[0],
        }

    def _tokens(self, passage: Passage) -> tuple[list[int], list[int]]:
        corpus = self.passage_sampler.corpus
        document, start, stop, context = passage
        encoding = corpus.backend.encode(corpus.span_text(start, stop), add_special_tokens=False)
        ids = list(encoding.ids)
        targets = list(ids)
        if context:
            carried = len(corpus.span_text(start, start + context))
            # A token that begins in the context and ends after it is new.
            old = sum(end <= carried for _, end in encoding.offsets)
            targets[:old] = [IGNORED] * old
        if self.eos is not None and stop == corpus.document_offsets[document + 1]:
            ids.append(self.eos)
            targets.append(self.eos)
        return ids, targets
