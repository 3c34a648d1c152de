"""Where sentences begin while a text is written: decided token by token, never changed by what follows."""

from __future__ import annotations

from typing import Any

from sentcompress.contracts import Segmenter
from sentcompress.errors import InputError

MAX_SENTENCE_TOKENS = 16
"""Longest sentence unless another is asked for."""
LOOK_BACK = 2
"""A mark this many tokens back may still end a sentence: some segmenters wait for what follows it."""
_WORDS = "the men who were there saw that it was good and then they all went home again to eat and sleep " * 4


class BoundaryFinder:
    """Decides for each token of one text whether it begins a sentence.

    The segmenter is asked whether it would cut the sentence so far, with the new token; if it would, the new token
    begins a sentence. So a boundary depends on nothing that comes later, and a text has the same sentences whether it
    is read at once or token by token. They can begin a token later than where the segmenter cuts the whole text.

    Args:
        segmenter: prepared.
        tokenizer: of the LLM.
        max_tokens: longest sentence; a longer one is cut.

    Raises:
        InputError: the segmenter cannot split.
    """

    def __init__(self, segmenter: Segmenter, tokenizer: Any, max_tokens: int) -> None:
        if not callable(getattr(segmenter, "split", None)):
            raise InputError(f"segmenter: {segmenter!r}", fix="give a name such as 'regex', or a segmenter")
        self.segmenter = segmenter
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._cuts_anywhere = len(segmenter.split(_WORDS)) > 1
        self._marks: dict[int, bool] = {}

    def begins(self, sentence: list[int], token: int) -> bool:
        """Whether a token begins a new sentence.

        The segmenter is slow, so it is asked only after a mark, unless it cuts between plain words too.

        Args:
            sentence: token ids of the sentence so far.
            token: the one that follows.
        """
        if not sentence:
            return False
        if len(sentence) >= self.max_tokens:
            return True
        if not self._cuts_anywhere and not any(map(self._is_mark, (*sentence[-LOOK_BACK:], token))):
            return False
        return len(self.segmenter.split(self._text([*sentence, token]))) > 1

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _is_mark(self, token: int) -> bool:
        """Whether a token has more in it than letters, digits and spaces."""
        mark = self._marks.get(token)
        if mark is None:
            mark = self._marks[token] = not self._text([token]).replace(" ", "a").isalnum()
        return mark
