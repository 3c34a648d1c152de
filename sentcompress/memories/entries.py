"""A few tokens of every older sentence."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.contracts import Options as BaseOptions


class Entries(Memory):
    """Keep the last tokens of every sentence: an LLM gathers there what it has read (arXiv 2412.12094)."""

    class Options(BaseOptions):
        entries: int = Field(default=1, ge=1)
        """Last tokens of each older sentence that are kept."""

    def keep(self, tokens: Tokens) -> Tensor:
        return tokens.behind < self.options.entries
