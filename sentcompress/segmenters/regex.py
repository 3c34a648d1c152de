"""The default segmenter: three presets of regular expressions, all lossless and linear in the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import regex
from pydantic import Field

from sentcompress.contracts import Segmenter, SegmenterOptions
from sentcompress.segmenters._cuts import BLANK, CLAUSE, LINE, LINE_ENDS, SENTENCE, SPACE, pieces, settle
from sentcompress.segmenters._rules import cuts

_PAPER = regex.compile(rf"[.,!?;:\"。，！？；：＂“”．｡]++[”’'」』»]*+|(?P<line>[{LINE_ENDS}])[{SPACE}]*+")
_MINIMUM = {"paper": (0, 0), "sentence": (0, 3), "clause": (12, 3)}
"""Least size of a piece by preset: for a cut between clauses, and for any other."""


class RegexSegmenter(Segmenter):
    """Cuts at marks and line ends: whole sentences, clauses, or the paper's plain rule."""

    class Options(SegmenterOptions):
        preset: Literal["sentence", "clause", "paper"] = "sentence"
        """``sentence``: whole sentences; ``clause``: also at , ; : and dashes; ``paper``: at every mark."""
        min_chars: int | None = Field(default=None, ge=0, le=1000)
        """Join a shorter piece to its neighbour (None: 3, between clauses 12, never for ``paper``)."""

    def split(self, text: str) -> list[str]:
        """Return the sentences of ``text`` in order; joined, they are ``text``."""
        preset, least = self.options.preset, self.options.min_chars
        clause, other = _MINIMUM[preset] if least is None else (least, least)
        places = _paper_cuts(text) if preset == "paper" else cuts(text, clauses=preset == "clause")
        return pieces(text, places, {CLAUSE: clause, SENTENCE: other, LINE: other, BLANK: other})


def _paper_cuts(text: str) -> Iterator[tuple[int, int]]:
    for match in _PAPER.finditer(text):
        # White space is looked over once: from the first of its line ends on.
        yield settle(text, match.start() if match.lastgroup else match.end()), SENTENCE
