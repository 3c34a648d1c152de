"""The held-out text that every scorer gets: the same bytes, cut the same way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sentcompress.errors import CoverageError, DataError
from sentcompress.recipe import BenchSettings
from sentcompress.text.corpus import Corpus


@dataclass(frozen=True)
class HeldoutDocument:
    """One held-out document, or its beginning.

    Attributes:
        number: of the document in the corpus.
        sentences: token ids of each sentence.
        texts: their texts; joined, the document.
        whole: False when only the beginning is scored, so that no decision to stop is due at its end.
        first_scored: the first sentence that is scored; those before it are context, given to every model.
    """

    number: int
    source: str
    sentences: list[list[int]]
    texts: list[str]
    whole: bool
    first_scored: int = 1

    @property
    def context_text(self) -> str:
        """What is given to every model and not scored."""
        return "".join(self.texts[: self.first_scored])

    @property
    def scored_text(self) -> str:
        """Everything after it."""
        return "".join(self.texts[self.first_scored :])

    @property
    def scored_bytes(self) -> int:
        return len(self.scored_text.encode("utf-8"))


def heldout_documents(corpus: Corpus, settings: BenchSettings) -> list[HeldoutDocument]:
    """Held-out documents within the recipe's limits; a document of one sentence has nothing to score and is left out.

    Raises:
        DataError: nothing is left to score.
    """
    documents = []
    for number in corpus.heldout.tolist():
        sentences = corpus.document_sentences(number)
        stop = sentences.start
        size = 0
        while stop < sentences.stop:
            size += int(corpus.sentence_bytes[stop])
            enough = settings.max_bytes_per_document is not None and size > settings.max_bytes_per_document
            if enough and stop >= sentences.start + 2:
                break
            stop += 1
        if stop - sentences.start < 2:
            continue
        numbers = range(sentences.start, stop)
        documents.append(
            HeldoutDocument(
                number=number,
                source=corpus.source(number),
                sentences=[corpus.sentence(i).tolist() for i in numbers],
                texts=[corpus.sentence_text(i) for i in numbers],
                whole=stop == sentences.stop,
            )
        )
        if settings.max_documents is not None and len(documents) == settings.max_documents:
            break
    if not documents:
        raise DataError(
            "no held-out document has more than one sentence, so there is nothing to score",
            fix="raise data.options.heldout_documents, or use a segmenter that makes shorter sentences",
        )
    return documents


@dataclass(frozen=True)
class Window:
    """A stretch of a document a model reads at once: ``start`` to ``stop``, scored from ``first_scored`` on."""

    start: int
    stop: int
    first_scored: int


def windows(length: int, size: int, first: int = 1) -> list[Window]:
    """Cover positions ``first`` to ``length - 1`` with windows of at most ``size`` positions.

    Those before ``first`` are context. The first window scores all it has from there on; each later one keeps at
    least half a window of context, so no position but the earliest is predicted from little context.
    """
    stop = min(length, max(size, first + max(1, size // 2)))
    found = [Window(max(0, stop - size), stop, first)]
    while found[-1].stop < length:
        first = found[-1].stop
        stop = min(length, first + max(1, size // 2))
        found.append(Window(max(0, stop - size), stop, first))
    return found


def check_bytes(what: str, covered: int, expected: int) -> None:
    """Refuse a scorer that did not score every byte.

    Raises:
        CoverageError: saying by how much they are off.
    """
    if covered != expected:
        raise CoverageError(
            f"{what}: {covered} bytes were scored, but the text has {expected}",
            fix="this is a bug in the scorer or in a plugin; no figure was printed",
        )


# ---- held-out sentences


def heldout_lengths(corpus: Corpus) -> np.ndarray:
    """Tokens of every held-out sentence, in the order of the text."""
    ranges = [corpus.document_sentences(number) for number in corpus.heldout.tolist()]
    return np.concatenate([np.asarray(corpus.sentence_lengths[r.start : r.stop]) for r in ranges])


def heldout_sentences(corpus: Corpus, count: int) -> list[list[int]]:
    """The first ``count`` held-out sentences, one after the other."""
    numbers = [n for document in corpus.heldout.tolist() for n in corpus.document_sentences(document)]
    return [corpus.sentence(number).tolist() for number in numbers[:count]]


def draw_lengths(corpus: Corpus, count: int, seed: int) -> list[int]:
    """Sentence lengths drawn from the held-out text."""
    return np.random.default_rng(seed).choice(heldout_lengths(corpus), count).tolist()
