"""Sentences as sentencex (Wikimedia) finds them."""

import itertools
import re

import sentencex
from pydantic import Field

import sentcompress

LONE_SURROGATES = re.compile("[\ud800-\udfff]")
WIDE_SPACES = re.compile(r"[^\S\t\n\v\f\r ]")
WINDOW = 200
"""Characters a piece may be away from where the one before it ended."""


class SentencexSegmenter(sentcompress.Segmenter):
    """Sentences by sentencex's rules for some 300 languages."""

    class Options(sentcompress.SegmenterOptions):
        language: str = Field(default="en", pattern="^[a-z]{2,3}(-[A-Za-z0-9]+)*$")
        """Language code. sentencex takes the rules of a related language where it has none of its own."""

    def split(self, text: str) -> list[str]:
        """Cut before each sentence; the white space around it stays with the sentence before."""
        # What sentencex fails on: lone surrogates are no UTF-8, and an initial before a space of several bytes
        # ("A\u3000.") makes it panic. Characters are replaced one by one, so that the places are those of the text.
        plain = WIDE_SPACES.sub(" ", LONE_SURROGATES.sub("\ufffd", text))
        places, end, begun = [0], 0, False
        for piece in self._pieces(plain):
            # Its pieces are looked up in the text: were one altered or left out, there would be no cut, and no loss.
            start = plain.find(piece, end, end + len(piece) + WINDOW)
            if start >= 0:
                end = start + len(piece)
                if begun and piece.strip():
                    places.append(end - len(piece.lstrip()))
            begun = begun or bool(piece.strip())
        places.append(len(text))
        return [text[a:b] for a, b in itertools.pairwise(places) if a < b]

    def _pieces(self, text: str) -> list[str]:
        try:
            return list(sentencex.segment(self.options.language, text))
        except BaseException as error:  # a panic in Rust is no Exception, and its class cannot be imported
            if type(error).__name__ != "PanicException":
                raise
        # Should there be more that it panics on, only the paragraph that holds it stays in one piece.
        paragraphs = re.findall(r"(?s).+?(?:\n\n+|\Z)", text)
        return paragraphs if len(paragraphs) < 2 else [p for part in paragraphs for p in self._pieces(part)]
