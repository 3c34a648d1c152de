"""NLTK's Punkt: trained data where it is installed, else learned from the corpus and saved with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import regex
from pydantic import Field

from sentcompress.contracts import Segmenter, SegmenterOptions
from sentcompress.errors import PluginError
from sentcompress.segmenters._cuts import BLANK, CLAUSE, LINE, LINE_ENDS, SENTENCE, pieces, settle
from sentcompress.segmenters._rules import HARD_END

_PARAGRAPH_END = regex.compile(rf"(?>\r\n|[{LINE_ENDS}])[ \t]*+[{LINE_ENDS}]\s*+")
_AS_LINE_FEEDS = str.maketrans(dict.fromkeys(LINE_ENDS, "\n"))
_BLOCK = 20_000
"""Punkt looks back to the last space at each mark: longer stretches are handed over in blocks."""


class PunktSegmenter(Segmenter):
    """Cuts where Punkt (Kiss and Strunk, 2006) finds sentences, at blank lines, and at the marks of other scripts."""

    class Options(SegmenterOptions):
        language: str = Field(default="english", pattern=r"^[a-z]+$")
        """Name of the trained ``punkt_tab`` data, used where it is installed."""
        learn_chars: int = Field(default=4_000_000, ge=0)
        """How much of the corpus to learn from, in characters, where there is no trained data."""

    def __init__(self, options: Any | None = None) -> None:
        super().__init__(options)
        self._punkt = _import_punkt()
        self._parameters = self._punkt.PunktParameters()
        self._ready = False
        self._build()

    def prepare(self, tokenizer: Any, documents: Iterable[str] | None = None) -> None:
        """Load the trained data or learn from ``documents``; a loaded state stays as it is."""
        self.tokenizer = tokenizer
        if self._ready:
            return
        trained = self._trained()
        if trained is not None:
            self._parameters, self._ready = trained, True
        elif documents is not None:
            trainer = self._punkt.PunktTrainer()
            for text in _first(documents, self.options.learn_chars):
                trainer.train(_with_line_feeds(text), finalize=False)
            trainer.finalize_training()
            self._parameters, self._ready = trainer.get_params(), True
        self._build()

    def split(self, text: str) -> list[str]:
        """Return the sentences of ``text`` in order; joined, they are ``text``."""
        return pieces(text, self._cuts(text), {CLAUSE: 0, SENTENCE: 0, LINE: 0, BLANK: 0})

    def state(self) -> dict[str, Any]:
        """Punkt's parameters as sorted lists; empty before :meth:`prepare`."""
        if not self._ready:
            return {}
        known = self._parameters
        return {
            "abbreviations": sorted(known.abbrev_types),
            "collocations": sorted(list(pair) for pair in known.collocations),
            "sentence_starters": sorted(known.sent_starters),
            "orthographic_context": sorted(
                [word, flags] for word, flags in known.ortho_context.items() if flags
            ),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        if not state:
            return
        known = self._punkt.PunktParameters()
        known.abbrev_types = set(state["abbreviations"])
        known.collocations = {(first, second) for first, second in state["collocations"]}
        known.sent_starters = set(state["sentence_starters"])
        known.ortho_context.update(dict(state["orthographic_context"]))
        self._parameters, self._ready = known, True
        self._build()

    def _build(self) -> None:
        self._tokenizer = self._punkt.PunktSentenceTokenizer()
        self._tokenizer._params = self._parameters

    def _trained(self) -> Any | None:
        try:
            return self._punkt.PunktTokenizer(self.options.language)._params
        except (LookupError, OSError):
            return None

    def _cuts(self, text: str) -> Iterator[tuple[int, int]]:
        for start, end in _blocks(text):
            block = _with_line_feeds(text[start:end])
            stops = [stop for _, stop in self._tokenizer.span_tokenize(block)]
            # Punkt knows the marks of Latin, Greek and Cyrillic text only.
            stops += (match.end() for match in HARD_END.finditer(block))
            for stop in sorted(stops):
                if start + stop < end:
                    yield settle(text, start + stop), SENTENCE
            if _PARAGRAPH_END.match(text, end):
                yield settle(text, end), BLANK


def _with_line_feeds(text: str) -> str:
    """The text, of the same length, with the one line end that Punkt knows."""
    return text.replace("\r\n", " \n").translate(_AS_LINE_FEEDS)


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Yield paragraphs, the blank lines between them left out, in stretches of bounded length."""
    start = 0
    for match in _PARAGRAPH_END.finditer(text):
        yield from _stretches(text, start, match.start())
        start = match.end()
    yield from _stretches(text, start, len(text))


def _stretches(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > _BLOCK:
        # At a space if there is one: the word after it decides whether a sentence ended before it.
        space = text.rfind(" ", start + 1, start + _BLOCK)
        stop = space if space > 0 else start + _BLOCK
        yield start, stop
        start = stop
    if end > start:
        yield start, end


def _first(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)


def _import_punkt() -> Any:
    try:
        from nltk.tokenize import punkt
    except ImportError as error:
        raise PluginError(
            "The segmenter 'nltk' needs the package nltk, which is not installed.",
            fix="pip install 'sentcompress[data]', or use segmenter regex",
        ) from error
    return punkt
