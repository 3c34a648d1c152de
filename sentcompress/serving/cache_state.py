"""What a text's cache holds while the text is written, for requests that ask with ``stream_options.include_cache``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sentcompress.text.lossless_tokenizer import lossless


@dataclass(frozen=True)
class CacheState:
    """The cache of one text.

    Attributes:
        device_bytes: with the model.
        host_bytes: in slow storage.
        full_bytes: what the LLM's own cache would hold of the same tokens.
        recalled: sentences that the last token recalled, as first and last character (exclusive) in prompt and text,
            each with the share of the heads that recalled it.
    """

    device_bytes: int
    host_bytes: int
    full_bytes: int
    recalled: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def chunk(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The field ``cache`` of a choice in a chunk."""
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "full_bytes": self.full_bytes,
            "recalled": [[*span, round(share, 3)] for span, share in self.recalled.items()],
        }

    def first_chunk(self, prompt_tokens: int, prompt: str) -> dict[str, Any]:
        """That of the first chunk. It has the prompt as the model reads it: places in ``recalled`` count from there."""
        return self.chunk(prompt_tokens, 0) | {"prompt": prompt}


class TokenPlaces:
    """The character at which each token of a text begins.

    Args:
        tokenizer: of the LLM.
        prompt: as text.
        ids: its tokens.
        encoded: they are what the tokenizer makes of the text, with special tokens or without (True, False); None: they
            were given as tokens.
    """

    def __init__(self, tokenizer: Any, prompt: str, ids: Sequence[int], encoded: bool | None) -> None:
        self._length = len(prompt)
        if encoded is None:
            spelt = map(lossless(tokenizer).to_bytes, ([token] for token in ids))
            # All bytes of a character but its first begin with the bits 10.
            sizes = [sum(byte & 0xC0 != 0x80 for byte in token) for token in spelt]
            spaces = sum(sizes) - len(prompt)  # some tokenizers put a space before a text
            starts = [max(0, place - spaces) for place in accumulate(sizes, initial=0)][:-1]
        else:
            offsets = tokenizer(prompt, add_special_tokens=encoded, return_offsets_mapping=True)
            starts = [start for start, _ in offsets["offset_mapping"]]
        self._starts = [*accumulate(starts, max)]  # special tokens behind the text are at 0

    def add(self, text: str) -> None:
        """Add a new token, and the text that it completes."""
        self._starts.append(self._length)
        self._length += len(text)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """First and last character (exclusive) of tokens, the last token exclusive too."""
        return self._starts[first], self._starts[last] if last < len(self._starts) else self._length
