"""The last sentences as they are, and the first tokens of the text."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.contracts import Options as BaseOptions


class Window(Memory):
    """Keep attention sinks (the first tokens, arXiv 2309.17453) and the last sentences."""

    class Options(BaseOptions):
        recent_sentences: int = Field(default=8, ge=0)
        """Sentences before the one being written that are kept whole."""
        recent_tokens: int | None = Field(default=None, ge=0)
        """Keep as many whole sentences as fit into this many tokens instead."""
        sinks: int = Field(default=4, ge=0)
        """First tokens of the text that are always kept; LLMs attend to them whatever they say."""

    def keep(self, tokens: Tokens) -> Tensor:
        limit = self.options.recent_tokens
        near = tokens.age <= self.options.recent_sentences if limit is None else tokens.distance <= limit
        return near | (tokens.position < self.options.sinks)
