"""Segmenter: text to sentences, losing nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from sentcompress.contracts.options import Component, Options


class SegmenterOptions(Options):
    """Options most segmenters share."""

    max_tokens: int = Field(default=64, ge=2, le=4096)
    """Longest sentence in tokens; a longer piece is split further at tokenization, never truncated."""


class Segmenter(Component):
    """Cuts text into sentences (paper section 3.1: before tokenization).

    ``"".join(split(text)) == text`` must hold for every string, and no piece may be empty.
    """

    Options: ClassVar[type[Options]] = SegmenterOptions
    tokenizer: Any = None
    """The backbone's tokenizer, set by :meth:`prepare`."""

    @property
    def max_tokens(self) -> int:
        """Longest sentence in tokens (64, as in the paper, where the options do not say)."""
        return int(getattr(self.options, "max_tokens", 64))

    def prepare(self, tokenizer: Any, documents: Iterable[str] | None = None) -> None:
        """Get ready for a corpus; called once before the first :meth:`split`.

        Args:
            tokenizer: the backbone's tokenizer.
            documents: training texts to learn from, or None when the state was loaded.
        """
        self.tokenizer = tokenizer

    def split(self, text: str) -> list[str]:
        """Return the sentences of ``text`` in order; joined, they are ``text``."""
        raise NotImplementedError(f"{type(self).__name__} must implement split(text)")

    def state(self) -> dict[str, Any]:
        """What :meth:`prepare` learned, as JSON values; saved with the model."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
