"""Sentences as sentencex (Wikimedia) finds them."""

import itertools
import re

import sentencex
from pydantic import Field

import sentcompress

LONE_SURROGATES = re.compile("[\ud800-\udfff]")
WINDOW = 200
"""Characters a piece may be away from where the one before it ended."""


class SentencexSegmenter(sentcompress.Segmenter):
    """Sentences by sentencex's rules for some 300 languages."""

    class Options(sentcompress.SegmenterOptions):
        language: str = Field(default="en", pattern="^[a-z]{2,3}(-[A-Za-z0-9]+)*$")
        """Language code. sentencex takes the rules of a related language where it has none of its own."""

    def split(self, text: str) -> list[str]:
        """Cut before each sentence; the white space around it stays with the sentence before."""
        # sentencex encodes to UTF-8, which lone surrogates refuse; any one character keeps the places.
        plain = LONE_SURROGATES.sub("\ufffd", text)
        places, end = [0], 0
        for piece in sentencex.segment(self.options.language, plain):
            # Its pieces are looked up in the text: were one altered or left out, there would be no cut, and no loss.
            start = plain.find(piece, end, end + len(piece) + WINDOW)
            if start < 0:
                continue
            end = start + len(piece)
            sentence = end - len(piece.lstrip())
            if places[-1] < sentence < end and plain[: places[-1] + 1].strip():
                places.append(sentence)
        places.append(len(text))
        return [text[a:b] for a, b in itertools.pairwise(places) if a < b]
