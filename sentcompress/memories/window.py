"""The last sentences as they are, and the first tokens of the text."""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.contracts import Options as BaseOptions


class Window(Memory):
    """Keep attention sinks (the first tokens, arXiv 2309.17453) and the last sentences."""

    class Options(BaseOptions):
        recent_sentences: int = Field(default=24, ge=0)
        """Sentences before the one being written that are kept whole."""
        recent_tokens: int | None = Field(default=None, ge=0)
        """Keep as many whole sentences as fit into this many tokens instead."""
        recent_share: float | None = Field(default=None, ge=0, le=1)
        """Keep as many whole sentences as fit into this share of the text so far instead."""
        sinks: int = Field(default=4, ge=0)
        """First tokens of the text that are always kept; LLMs attend to them whatever they say."""

        @model_validator(mode="after")
        def _one_limit(self) -> Window.Options:
            if self.recent_tokens is not None and self.recent_share is not None:
                raise ValueError("recent_tokens and recent_share exclude each other")
            return self

    def keep(self, tokens: Tokens) -> Tensor:
        options = self.options
        if options.recent_tokens is not None:
            near = tokens.distance <= options.recent_tokens
        elif options.recent_share is not None:
            before = tokens.position - tokens.offset + tokens.distance
            near = tokens.distance <= options.recent_share * before
        else:
            near = tokens.age <= options.recent_sentences
        return near | (tokens.position < options.sinks)
