"""Splits a document into sentences and tokenizes them, and proves that no text was lost. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from sentcompress.contracts import Segmenter
from sentcompress.errors import DataError, PluginError
from sentcompress.registry import describe_component, get_registry
from sentcompress.text.lossless_tokenizer import LosslessTokenizer, lossless
from sentcompress.text.time_limit import VARIABLE, Overtime, TimeLimit, split_seconds

T = TypeVar("T")
Sentence = tuple[str, list[int]]
"""A sentence's text and its tokens, without special tokens."""

_LINE_ENDS = frozenset("\n\r\x0b\x0c\x85\u2028\u2029")
_STOPS = _LINE_ENDS.union(".,;:!?)]}\"'»”’…—–、。，；：！？」』）؟،؛۔।॥။၊។።፣")
_BATCH_CHARACTERS = 1 << 18
"""Characters to tokenize at once: the tokenizer's output takes a hundred bytes per token."""
_MAX_PIECE = 1 << 16
_CHARACTERS_PER_TOKEN = 64
"""More than in any real text. Longer pieces are cut before they are tokenized (see ``_MAX_PIECE``)."""


def saved_segmenter(
    name: str, options: dict[str, Any] | None, state: dict[str, Any], tokenizer: Any
) -> Segmenter:
    """A segmenter as it was saved beside a model, what it had learned restored.

    Raises:
        PluginError: no plugin provides it.
        RecipeError: it does not take these options.
    """
    segmenter: Segmenter = get_registry().create("segmenter", name, options)
    segmenter.load_state(state)
    segmenter.prepare(tokenizer, None)
    return segmenter


def sentences_to_ids(text: str, segmenter: Segmenter, tokenizer: Any) -> list[Sentence]:
    """Split a text into sentences of at most ``segmenter.max_tokens`` tokens and tokenize them.

    Returns:
        ``(text, ids)`` of each sentence; joined, the texts equal ``text``.

    Raises:
        PluginError: the segmenter failed, lost text, or did not return.
        DataError: ``max_tokens`` is too small for a character of the text, or the tokenizer has no token for it.
    """
    pieces = checked_split(text, segmenter)
    return list(tokenize_pieces(pieces, lossless(tokenizer), segmenter.max_tokens))


def checked_split(text: str, segmenter: Segmenter, seconds: float | None = None) -> list[str]:
    """``segmenter.split(text)``, checked to be lossless and stopped if it does not return (see ``TimeLimit``).

    Args:
        seconds: time limit, 0 for none; by default :func:`split_seconds`.

    Raises:
        PluginError: names the segmenter, its package, and where it lost, changed or added text.
    """
    seconds = split_seconds(len(text)) if seconds is None else seconds
    try:
        with TimeLimit(seconds):
            pieces = segmenter.split(text)
    except Overtime:
        raise PluginError(
            f"{describe_component('segmenter', segmenter)} did not return within {seconds:.3g} s for "
            f"{len(text):,} characters that begin with {text[:40]!r}",
            fix=f"report this to its author, use another segmenter, or allow more time: {VARIABLE}=600",
        ) from None
    except Exception as error:
        raise _broken(segmenter, f"failed: {type(error).__name__}: {error}") from error
    if not isinstance(pieces, list):
        raise _broken(segmenter, f"must return a list of strings, not {type(pieces).__name__}")
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise _broken(
                segmenter, f"must return a list of strings, but item {number} is {type(piece).__name__}"
            )
    if "".join(pieces) != text:
        raise _broken(segmenter, f"is not lossless: {_first_difference(text, pieces)}")
    if "" in pieces:
        raise _broken(segmenter, f"returned an empty sentence (number {pieces.index('')}) for {text[:40]!r}")
    return pieces


def _broken(segmenter: Segmenter, problem: str) -> PluginError:
    return PluginError(
        f"{describe_component('segmenter', segmenter)} {problem}",
        fix="report this to the segmenter's author, or use another segmenter",
    )


def _first_difference(text: str, pieces: list[str]) -> str:
    at = 0
    for piece in pieces:
        if not text.startswith(piece, at):
            rest = text[at : at + len(piece)]
            same = next((n for n, (a, b) in enumerate(zip(rest, piece, strict=False)) if a != b), len(rest))
            had, got = text[at + same :], piece[same:]
            return f"at character {at + same} the text has {_start(had)}, the sentence {_start(got)}"
        at += len(piece)
    return f"the text from character {at} on is missing: {_start(text[at:])}"


def _start(text: str) -> str:
    """The beginning of a text for a message; a combining mark is escaped, since it would merge with the quote."""
    return (
        ascii(text[:1])[:-1] + repr(text[1:40])[1:]
        if unicodedata.combining(text[:1] or " ")
        else repr(text[:40])
    )


def tokenize_pieces(
    pieces: Sequence[str], tokenizer: LosslessTokenizer, max_tokens: int
) -> Generator[Sentence, None, int]:
    """Tokenize the pieces of a whole text, splitting those of more than ``max_tokens`` tokens further.

    Yields:
        the sentences; only a few are in memory at once.

    Returns:
        the number of pieces that were too long.
    """
    too_long = 0
    prefix, longest = tokenizer.prefix, max(_MAX_PIECE, max_tokens * _CHARACTERS_PER_TOKEN)
    cut = _cut([prefix + pieces[0], *pieces[1:]] if pieces else [], longest)
    for batch in in_batches(cut, len, _BATCH_CHARACTERS):
        for piece, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            parts = [(piece, ids)]
            if len(ids) > max_tokens:
                too_long += 1
                parts = _split_long(piece, ids, tokenizer, max_tokens)
            for part, part_ids in parts:
                text, prefix = part.removeprefix(prefix), ""
                if text:
                    yield text, part_ids
    return too_long


def in_batches(
    items: Iterable[T], size: Callable[[T], int], total: int, most: int | None = None
) -> Iterator[list[T]]:
    """Lists of consecutive items; each ends when its size reaches ``total`` or it has ``most`` items."""
    batch: list[T] = []
    together = 0
    for item in items:
        batch.append(item)
        together += size(item)
        if together >= total or len(batch) == most:
            yield batch
            batch, together = [], 0
    if batch:
        yield batch


def _cut(pieces: Sequence[str], longest: int) -> Iterator[str]:
    """The pieces, with those over ``longest`` characters cut."""
    for piece in pieces:
        start = 0
        while start < len(piece):
            stop = _best_cut(piece, start, longest)
            yield piece[start:stop]
            start = stop


def _split_long(text: str, ids: list[int], tokenizer: LosslessTokenizer, max_tokens: int) -> list[Sentence]:
    """Cut a text with tokens ``ids`` into as few parts as possible, of about equal size."""
    per_token = len(text) / len(ids)
    parts: list[Sentence] = []
    start = 0
    while start < len(text):
        longest = max(1, int(per_token * max_tokens))
        while True:
            cut = _best_cut(text, start, longest)
            # Only tokenizing a cut text shows how many tokens it has.
            part = tokenizer.encode(text[start:cut], begins=False)
            if len(part) <= max_tokens:
                break
            if cut - start == 1:
                raise DataError(
                    f"the character {text[start:cut]!r} alone has {len(part)} tokens, more than "
                    f"max_tokens ({max_tokens})",
                    fix=f"set segmenter.options.max_tokens to {len(part)} or more",
                )
            longest = max(1, min(cut - start - 1, int((cut - start) * max_tokens / len(part))))
        parts.append((text[start:cut], part))
        start = cut
    return parts


def _best_cut(text: str, start: int, longest: int) -> int:
    """Where to end a part that begins at ``start`` and has at most ``longest`` characters.

    Preferably after punctuation, else before white space, else between any characters; as close as possible to the
    position that makes all remaining parts equally long.
    """
    rest = len(text) - start
    if rest <= longest:
        return len(text)
    target = start + rest // -(-rest // longest)
    low, high = start + max(1, longest // 2), start + longest
    order = sorted(range(low, high + 1), key=lambda cut: abs(cut - target))
    for fits in (_ends_clause, _before_space):
        for cut in order:
            if fits(text, cut):
                return cut
    for cut in range(high, start, -1):
        if not _joins(text[cut - 1], text[cut]):
            return cut
    return high


def _ends_clause(text: str, cut: int) -> bool:
    before, after = text[cut - 1], text[cut]
    if before == "\r" and after == "\n":
        return False
    return before in _STOPS and (after.isspace() or before in _LINE_ENDS or not before.isascii())


def _before_space(text: str, cut: int) -> bool:
    return text[cut].isspace() and not text[cut - 1].isspace()


def _joins(before: str, after: str) -> bool:
    """Whether a cut here would separate a mark (accent, emoji part, line feed) from its character."""
    return (
        before == "\u200d"
        or after in "\u200d\ufe0e\ufe0f"
        or unicodedata.combining(after) != 0
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or (before == "\r" and after == "\n")
    )
