"""Samplers for token-level models: sequences of equal length cut from whole documents, and passages as tokens.

Documents are tokenized whole, not by sentences, and cached beside the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sentcompress.text.cache import open_cached
from sentcompress.text.corpus import Corpus
from sentcompress.text.encoding import offsets, token_dtype
from sentcompress.text.progress import Bar, speaker
from sentcompress.text.sampling import Batch, Epochs, Passage, PassageSampler, check_counts, pad
from sentcompress.text.segmentation import in_batches

IGNORED = -100
"""Label of a position without a target (the convention of transformers)."""
_BATCH_TEXTS = 32
_MAX_CHARACTERS = 1 << 21
"""Characters to tokenize at once: the tokenizer's output takes 200 bytes per token."""


@dataclass(frozen=True)
class WholeTokens:
    """Tokens of all documents of a corpus, without special tokens.

    Attributes:
        tokens: flat, memory-mapped.
        offsets: ``[D + 1]`` into ``tokens``.
    """

    tokens: np.ndarray
    offsets: np.ndarray


def open_whole(corpus: Corpus, *, progress: bool = True) -> WholeTokens:
    """Open the tokens of a corpus' whole documents from the cache; tokenize them first if they are missing.

    Raises:
        StorageError: the cache cannot be written.
    """
    folder = corpus.folder.parent.parent / "whole" / corpus.key

    def read(meta: dict[str, Any]) -> WholeTokens:
        return WholeTokens(
            np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
            np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False),
        )

    return open_cached(
        folder, corpus.key, read, lambda empty: _fill(empty, corpus, progress), speaker(progress).print
    )


def _fill(folder: Path, corpus: Corpus, progress: bool) -> dict[str, Any]:
    dtype = token_dtype(corpus.tokenizer.vocab_size)
    counts = np.zeros(corpus.num_documents, dtype=np.int64)
    total = int(corpus.sentence_bytes.sum())
    with (
        (folder / "tokens.bin").open("wb") as file,
        Bar("tokenizing whole documents", total, enabled=progress) as bar,
    ):
        for batch in in_batches(_texts(corpus), lambda text: len(text[1]), _MAX_CHARACTERS, _BATCH_TEXTS):
            texts = [text for _, text in batch]
            # The tokenizer distributes them over its own threads.
            for (document, _), ids in zip(batch, corpus.tokenizer.encode_batch(texts), strict=True):
                np.array(ids, dtype=dtype).tofile(file)
                counts[document] += len(ids)
            bar.advance(sum(len(text.encode("utf-8")) for text in texts))
    np.save(folder / "offsets.npy", offsets(counts))
    return {"dtype": dtype}


def _texts(corpus: Corpus) -> Iterator[tuple[int, str]]:
    """All documents with their numbers; very long ones in several pieces."""
    for document in range(corpus.num_documents):
        for text in _pieces(corpus.tokenizer.prefix + corpus.document_text(document)):
            yield document, text


def _pieces(text: str) -> Iterator[str]:
    """Cut a text of more than ``_MAX_CHARACTERS`` before line ends or spaces."""
    start = 0
    while len(text) - start > _MAX_CHARACTERS:
        low, high = start + _MAX_CHARACTERS // 2, start + _MAX_CHARACTERS
        cut = max(text.rfind("\n", low, high), text.rfind(" ", low, high))
        stop = high if cut < 0 else cut
        yield text[start:stop]
        start = stop
    yield text[start:]


class TokenSampler:
    """Whole documents, each followed by ``eos``, one after the other, cut into sequences of equal length.

    The order of the documents changes every epoch, and so do the cuts.
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
        check_counts(
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
        self._documents = Epochs(seed, lambda rng: rng.permutation(len(self.documents)))
        # A batch should not consist of neighbouring sequences of one long document.
        self._sequences = Epochs(seed + 1, lambda rng: rng.permutation(self.sequences))

    def batch(self, index: int) -> Batch:
        """``input_ids, attention_mask, labels [B, T]`` int64; only the last sequence of an epoch has padding."""
        epoch, number = divmod(index, self.batches_per_epoch)
        order = self._documents.order(epoch)
        ends = np.cumsum(self._lengths[order])
        chosen = self._sequences.order(epoch)[number * self.size : (number + 1) * self.size]
        rows = [self._read(order, ends, int(i) * self.length) for i in chosen]
        input_ids, attention_mask = pad(rows, self.eos_token_id, self.length)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(attention_mask == 0, IGNORED),
        }

    def _read(self, order: np.ndarray, ends: np.ndarray, start: int) -> np.ndarray:
        """Up to ``sequence_length`` tokens of the epoch's token stream from position ``start``."""
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
    """The passages of a :class:`PassageSampler` as sequences of tokens, for the baseline.

    A passage's text is tokenized whole, as users of a token-level model do; more than ``max_length`` tokens become
    several sequences. Text that was carried over as context is read but not scored.

    Args:
        max_length: ``T`` at most.
        bos: token put before each sequence, or None.
        eos: token put after a document's last passage, or None.
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
        input_ids, attention_mask = pad(rows, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": pad(labels, IGNORED)[0],
        }

    def _tokens(self, passage: Passage) -> tuple[list[int], list[int]]:
        corpus = self.passage_sampler.corpus
        document, start, stop, context = passage
        text = corpus.span_text(start, stop)
        ids = corpus.tokenizer.encode(text, begins=start == corpus.document_offsets[document])
        targets = list(ids)
        if context:
            carried = int(corpus.sentence_bytes[start : start + context].sum())
            # A token that begins in the context and ends after it is scored.
            ends = np.cumsum(corpus.tokenizer.byte_sizes(ids, text))
            old = int((ends <= carried).sum())
            targets[:old] = [IGNORED] * old
        if self.eos is not None and stop == corpus.document_offsets[document + 1]:
            ids.append(self.eos)
            targets.append(self.eos)
        return ids, targets
