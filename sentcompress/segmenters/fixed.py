"""Pieces of a fixed number of tokens: no grammar, the shortest code, a baseline for the others."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import Field, model_validator

from sentcompress.contracts import Segmenter, SegmenterOptions
from sentcompress.errors import InputError, RunError


class FixedSegmenter(Segmenter):
    """Cuts after every ``tokens`` tokens of the backbone's tokenizer."""

    class Options(SegmenterOptions):
        tokens: int = Field(default=16, ge=1, le=4096)
        """Tokens in a piece (the last may be shorter)."""

        @model_validator(mode="after")
        def _within_the_limit(self) -> FixedSegmenter.Options:
            if self.tokens > self.max_tokens:
                raise ValueError(f"tokens ({self.tokens}) must not exceed max_tokens ({self.max_tokens})")
            return self

    def prepare(self, tokenizer: Any, documents: Any = None) -> None:
        """Keep the tokenizer; it must be a fast one, which knows where its tokens stand in the text."""
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "The fixed segmenter needs a fast tokenizer, which knows where its tokens are in the text.",
                fix="load it with AutoTokenizer.from_pretrained(..., use_fast=True), or use segmenter regex",
            )
        self.tokenizer = tokenizer

    def split(self, text: str) -> list[str]:
        """Return pieces of ``tokens`` tokens each; joined, they are ``text``."""
        if self.tokenizer is None:
            raise RunError(
                "The fixed segmenter has no tokenizer yet.",
                fix="call prepare(tokenizer) before split(text)",
            )
        if not text:
            return []
        # A lone surrogate cannot be encoded; any one character in its place keeps the offsets right.
        plain = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
        encoded = self.tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        places, count = [0], 0
        for (_, end), (start, _) in zip(offsets, [*offsets[1:], (len(text), len(text))], strict=True):
            count += 1
            # Tokens that share a character (bytes of an emoji) overlap: wait for the character's end.
            if count >= self.options.tokens and places[-1] < end <= start and end < len(text):
                places.append(end)
                count = 0
        places.append(len(text))
        return [text[a:b] for a, b in itertools.pairwise(places)]
