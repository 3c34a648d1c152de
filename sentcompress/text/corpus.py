"""A corpus: documents split into sentences and tokenized once, memory-mapped from the token cache. No torch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from sentcompress.contracts import Dataset, Document, Segmenter
from sentcompress.errors import PluginError, SentCompressError
from sentcompress.registry import describe_component
from sentcompress.text.cache import cache_root, corpus_key, open_cached
from sentcompress.text.documents import DocumentFile, GrowingArray, growing_arrays
from sentcompress.text.encoding import Encoded, choose_workers, encode_documents, token_dtype
from sentcompress.text.heldout import choose_heldout, first_copies
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless
from sentcompress.text.progress import Bar, speaker

_ARRAYS = (
    "sentence_offsets",
    "sentence_bytes",
    "sentence_starts",
    "document_offsets",
    "train",
    "heldout",
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_HISTOGRAM_BINS = 32
COUNTED_TOKENS = 2_000_000
"""Tokens that are counted to estimate how frequent each token is."""


class Corpus:
    """The read-only arrays of a tokenized corpus. Sentences and documents are numbered from 0.

    Attributes:
        key: digest of everything that changes the content.
        tokens: all sentences' tokens, without special tokens.
        sentence_offsets: ``[S + 1]`` into ``tokens``.
        sentence_bytes: ``[S]`` UTF-8 bytes of each sentence.
        document_offsets: ``[D + 1]`` into sentences.
        train, heldout: indexes of documents.
        tokenizer: it encoded the text.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], tokenizer: LosslessTokenizer) -> None:
        self.folder = folder
        self.meta = meta
        self.key: str = meta["key"]
        self.tokenizer = tokenizer
        self.tokens = self._raw("tokens.bin", meta["dtype"])
        self._text = self._raw("text.bin", "uint8")
        self.sentence_offsets = self._array("sentence_offsets")
        self.sentence_bytes = self._array("sentence_bytes")
        self._sentence_starts = self._array("sentence_starts")
        self.document_offsets = self._array("document_offsets")
        self.train = self._array("train")
        self.heldout = self._array("heldout")

    def _raw(self, name: str, dtype: str) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_bytes)

    @cached_property
    def sentence_lengths(self) -> np.ndarray:
        """``[S]`` tokens of each sentence."""
        return np.diff(self.sentence_offsets)

    def sentence(self, index: int) -> np.ndarray:
        """A sentence's tokens, int64, without special tokens."""
        return self.tokens[self.sentence_offsets[index] : self.sentence_offsets[index + 1]].astype(np.int64)

    def sentence_text(self, index: int) -> str:
        """A sentence's text, exactly as in its document."""
        start = int(self._sentence_starts[index])
        return bytes(self._text[start : start + int(self.sentence_bytes[index])]).decode("utf-8")

    def document_sentences(self, document: int) -> range:
        """Numbers of a document's sentences."""
        return range(int(self.document_offsets[document]), int(self.document_offsets[document + 1]))

    def document_text(self, document: int) -> str:
        """A document's whole text."""
        sentences = self.document_sentences(document)
        return self.span_text(sentences.start, sentences.stop)

    def span_text(self, start: int, stop: int) -> str:
        """The text of sentences ``start`` to ``stop - 1`` of one document."""
        begin = int(self._sentence_starts[start])
        end = int(self._sentence_starts[stop - 1]) + int(self.sentence_bytes[stop - 1])
        return bytes(self._text[begin:end]).decode("utf-8")

    def train_counts(self, vocab_size: int) -> np.ndarray:
        """``[V]``: how often each token occurs in about ``COUNTED_TOKENS`` tokens of training documents."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        tokens_before = self.sentence_offsets[self.document_offsets]
        total = int((tokens_before[self.train + 1] - tokens_before[self.train]).sum())
        for number in self.train[:: max(1, round(total / COUNTED_TOKENS))].tolist():
            tokens = self.tokens[tokens_before[number] : tokens_before[number + 1]]
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts

    @cached_property
    def _sources(self) -> list[str]:
        return json.loads((self.folder / "sources.json").read_text(encoding="utf-8"))

    def source(self, document: int) -> str:
        """Where a document came from."""
        return self._sources[document]

    def summary(self) -> dict[str, Any]:
        """Counts, sentence lengths in tokens with their histogram, and what happened while building."""
        lengths = np.asarray(self.sentence_lengths)
        edges = np.unique(np.linspace(1, lengths.max() + 1, _HISTOGRAM_BINS + 1).round().astype(np.int64))
        counts, _ = np.histogram(lengths, bins=edges)
        percentiles = np.percentile(lengths, (5, 25, 50, 75, 95, 99))
        return {
            "documents": self.num_documents,
            "train_documents": len(self.train),
            "heldout_documents": len(self.heldout),
            "sentences": self.num_sentences,
            "tokens": len(self.tokens),
            "bytes": int(self.sentence_bytes.sum()),
            "sentences_per_document": self.num_sentences / self.num_documents,
            "sentence_tokens_mean": float(lengths.mean()),
            "sentence_tokens_median": float(percentiles[2]),
            "sentence_tokens_max": int(lengths.max()),
            "sentence_tokens_percentiles": dict(
                zip(("5", "25", "50", "75", "95", "99"), map(float, percentiles), strict=True)
            ),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            **{
                name: self.meta[name]
                for name in ("split_sentences", "empty_documents", "replaced_surrogates")
            },
        }


def build_corpus(
    dataset: Dataset,
    segmenter: Segmenter,
    tokenizer: Any,
    *,
    cache_dir: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Open the corpus from the token cache; build it first if it is missing or damaged.

    Afterwards the segmenter is prepared: from training documents only, or from the cached state.

    Args:
        tokenizer: a fast transformers tokenizer.
        cache_dir: used instead of ``$SENTCOMPRESS_CACHE`` or ``~/.cache/sentcompress``.
        workers: processes; None chooses by the size of the text.
        progress: show a progress bar and messages.

    Raises:
        DataError: documents cannot be read, or there are too few.
        PluginError: the segmenter or dataset failed, or the segmenter loses text or does not return.
        StorageError: the cache cannot be written.
    """
    exact = lossless(tokenizer)
    wanted = int(getattr(dataset.options, "heldout_documents", 20))
    key = corpus_key(dataset, segmenter, exact, wanted)
    folder = (cache_dir or cache_root()) / "corpora" / key
    console = speaker(progress)
    builder = _Builder(dataset, segmenter, tokenizer, console)
    corpus = open_cached(
        folder,
        key,
        lambda meta: Corpus(folder, meta, exact),
        lambda empty: builder.fill(empty, wanted, workers),
        console.print,
    )
    # The state in the cache counts, even after a build: another process may have been faster.
    if segmenter.tokenizer is not tokenizer or segmenter.state() != corpus.meta["segmenter_state"]:
        segmenter.load_state(corpus.meta["segmenter_state"])
        _prepare(segmenter, tokenizer, None)
    return corpus


class _Builder:
    """Builds a corpus' folder: the texts, the choice of held-out documents, the segmenter's state, the tokens."""

    def __init__(self, dataset: Dataset, segmenter: Segmenter, tokenizer: Any, console: Console) -> None:
        self.dataset, self.segmenter, self.tokenizer = dataset, segmenter, tokenizer
        self.console = console

    def fill(self, folder: Path, wanted: int, workers: int | None) -> dict[str, Any]:
        """Write the arrays into an empty folder; return what ``meta.json`` should say."""
        began = time.monotonic()
        self.empty = self.surrogates = 0
        documents = DocumentFile(folder)
        documents.fill(self._texts())
        self._report_repairs()
        heldout = choose_heldout(documents.hashes, wanted)
        if len(heldout) < wanted:
            self.console.print(
                f"{len(documents)} documents: {len(heldout)} are held out instead of {wanted} (at most half)"
            )
        learned = bool(self.segmenter.state())  # it came with a model: keep its state
        texts = None if learned else documents.texts(lambda index: index not in heldout)
        _prepare(self.segmenter, self.tokenizer, texts)
        workers = workers or choose_workers(documents.size)
        exact = lossless(self.tokenizer)
        dtype = token_dtype(exact.vocab_size)
        scored = first_copies(documents.hashes, heldout)
        results = encode_documents(
            documents.path,
            documents.spans,
            self.segmenter,
            exact,
            dtype,
            workers,
            self.console.print,
        )
        with closing(results):  # its processes end first, whatever happens
            too_long = self._write_arrays(folder, documents, results, heldout, scored)
        return {
            "dtype": dtype,
            "dataset": type(self.dataset).__name__,
            "segmenter": f"{type(self.segmenter).__module__}.{type(self.segmenter).__qualname__}",
            "segmenter_options": self.segmenter.options.model_dump(mode="json"),
            "segmenter_state": self.segmenter.state(),
            "split_sentences": too_long,
            "empty_documents": self.empty,
            "replaced_surrogates": self.surrogates,
            "seconds": round(time.monotonic() - began, 2),
            "workers": workers,
        }

    def _texts(self) -> Iterator[tuple[bytes, str]]:
        """The documents that have text, as bytes, with their sources. A dataset is read only once."""
        limit = getattr(self.dataset.options, "max_documents", None)
        for document in islice(self._documents(), limit):
            text, replaced = _SURROGATES.subn("\ufffd", document.text)
            if not text.strip():
                self.empty += 1
                continue
            self.surrogates += replaced
            yield text.encode("utf-8"), document.source

    def _report_repairs(self) -> None:
        if self.empty:
            self.console.print(f"{self.empty} empty document(s) skipped")
        if self.surrogates:
            self.console.print(f"{self.surrogates} lone surrogate(s) replaced with U+FFFD")

    def _documents(self) -> Iterator[Document]:
        try:
            for document in self.dataset.documents():
                if not isinstance(document, Document) or not isinstance(document.text, str):
                    raise PluginError(
                        f"{describe_component('dataset', self.dataset)} must yield Document(text, source) "
                        f"with strings, but yielded {repr(document)[:80]}",
                        fix="report this to its author",
                    )
                yield document
        except SentCompressError:
            raise
        except Exception as error:
            name = describe_component("dataset", self.dataset)
            raise PluginError(
                f"{name} failed: {type(error).__name__}: {error}",
                fix="check the options in the recipe's data section; if they are right, report this to the dataset's "
                "author",
            ) from error

    def _write_arrays(
        self,
        folder: Path,
        documents: DocumentFile,
        results: Iterator[Encoded],
        heldout: set[int],
        scored: set[int],
    ) -> int:
        """Write encoded documents as they come; return how many sentences had to be split further.

        Args:
            heldout: documents that are not trained on.
            scored: those of them that are scored.
        """
        too_long = done = 0
        with (
            Bar("tokenizing", documents.size, enabled=not self.console.quiet) as bar,
            (folder / "tokens.bin").open("wb") as tokens,
            growing_arrays(folder, *_ARRAYS) as arrays,
        ):
            arrays["sentence_offsets"].append(np.zeros(1, dtype=np.int64))
            arrays["document_offsets"].append(np.zeros(1, dtype=np.int64))
            written = 0
            for part in results:
                part.tokens.tofile(tokens)
                too_long += part.too_long
                self._append(arrays, part, documents, done, written, heldout, scored)
                done += len(part.sentences)
                written += int(part.lengths.sum())
                bar.advance(int(part.byte_lengths.sum()))
        documents.write_sources(folder / "sources.json")
        return too_long

    @staticmethod
    def _append(
        arrays: dict[str, GrowingArray],
        part: Encoded,
        documents: DocumentFile,
        first: int,
        tokens: int,
        heldout: set[int],
        scored: set[int],
    ) -> None:
        """Append the documents from number ``first`` on; ``tokens`` tokens were written before them."""
        numbers = range(first, first + len(part.sentences))
        before = arrays["sentence_bytes"].length
        arrays["sentence_offsets"].append(tokens + np.cumsum(part.lengths))
        arrays["sentence_bytes"].append(part.byte_lengths)
        # Sentences lie one after the other in their document, documents one after the other in the file.
        running = np.cumsum(part.byte_lengths) - part.byte_lengths
        firsts = np.cumsum(part.sentences) - part.sentences
        begins = np.array([documents.start(number) for number in numbers], dtype=np.int64)
        arrays["sentence_starts"].append(running + np.repeat(begins - running[firsts], part.sentences))
        arrays["document_offsets"].append(before + np.cumsum(part.sentences))
        train = [number for number in numbers if number not in heldout]
        arrays["train"].append(np.array(train, dtype=np.int64))
        test = [number for number in numbers if number in scored]
        arrays["heldout"].append(np.array(test, dtype=np.int64))


def _prepare(segmenter: Segmenter, tokenizer: Any, documents: Iterator[str] | None) -> None:
    try:
        segmenter.prepare(tokenizer, documents)
    except SentCompressError:
        raise
    except Exception as error:
        name = describe_component("segmenter", segmenter)
        message = f"{name} failed to prepare: {type(error).__name__}: {error}"
        raise PluginError(message, fix="report this to its author, or use another segmenter") from error
