"""Samplers for token-level models: documents cut into equal sequences, and passages as rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sentcompress.text.corpus import Corpus
from sentcompress.text.order import Epochs
from sentcompress.text.sampling import Batch, Passage, PassageSampler, check_counts, pad
from sentcompress.text.whole import open_whole

IGNORED = -100
"""Label of a position that is no target (the convention of transformers)."""


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
        # Neighbouring sequences of one long document should not make up a batch.
        self._sequences = Epochs(seed + 1, lambda rng: rng.permutation(self.sequences))

    def batch(self, index: int) -> Batch:
        """``input_ids, attention_mask, labels [B, T]`` int64; only an epoch's last sequence has padding."""
        epoch, place = divmod(index, self.batches_per_epoch)
        order = self._documents.order(epoch)
        ends = np.cumsum(self._lengths[order])
        chosen = self._sequences.order(epoch)[place * self.size : (place + 1) * self.size]
        rows = [self._read(order, ends, int(i) * self.length) for i in chosen]
        input_ids, attention_mask = pad(rows, self.eos_token_id, self.length)
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
        input_ids, attention_mask = pad(rows, self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": pad(labels, IGNORED)[0],
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
