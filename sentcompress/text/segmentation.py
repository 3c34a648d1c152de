"""One document to sentences and their tokens, with a proof that nothing was lost. No torch."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from sentcompress.contracts import Segmenter
from sentcompress.errors import DataError, PluginError

Sentence = tuple[str, list[int]]
"""A sentence's text and its tokens, without special tokens."""

_STOPS = frozenset(".,;:!?)]}\"'»”’…—–、。，；：！？」』）\n")
_backends: WeakKeyDictionary[Any, tuple[int, Tokenizer]] = WeakKeyDictionary()


def plain_backend(tokenizer: Any) -> Tokenizer:
    """A copy of a tokenizer's Rust core with no truncation and no padding.

    In the copy, a special token's name in a text (``</s>``) is text like any other: otherwise a document
    could put end marks into its own sentences.

    Args:
        tokenizer: a fast transformers tokenizer.

    Raises:
        DataError: a tokenizer without a Rust core.
    """
    source = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(source, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", fix="use a model that has a tokenizer.json"
        )
    size = len(tokenizer)
    if tokenizer in _backends and _backends[tokenizer][0] == size:
        return _backends[tokenizer][1]
    backend = Tokenizer.from_str(source.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    _backends[tokenizer] = (size, backend)
    return backend


def sentences_to_ids(text: str, segmenter: Segmenter, tokenizer: Any) -> list[Sentence]:
    """Cut a text into sentences of at most ``segmenter.max_tokens`` tokens and tokenize them.

    Returns:
        ``(text, ids)`` of each sentence; joined, the texts are ``text``. Empty when ``text`` has no tokens.

    Raises:
        PluginError: the segmenter failed or lost text.
        DataError: ``max_tokens`` is too small for a character of the text.
    """
    pieces = checked_split(text, segmenter)
    return tokenize_pieces(pieces, plain_backend(tokenizer), segmenter.max_tokens)[0]


def checked_split(text: str, segmenter: Segmenter) -> list[str]:
    """``segmenter.split(text)``, proven lossless.

    Raises:
        PluginError: naming the segmenter and the place where it lost, changed or invented text.
    """
    name = f"{type(segmenter).__module__}.{type(segmenter).__qualname__}"
    fix = "report this to the segmenter's author, or use another segmenter"
    try:
        pieces = segmenter.split(text)
    except Exception as error:
        raise PluginError(f"segmenter {name} failed: {type(error).__name__}: {error}", fix=fix) from error
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise PluginError(f"segmenter {name} must return a list of strings", fix=fix)
    if "".join(pieces) != text:
        raise PluginError(f"segmenter {name} is not lossless: {_first_difference(text, pieces)}", fix=fix)
    if "" in pieces:
        raise PluginError(f"segmenter {name} returned an empty sentence (number {pieces.index('')})", fix=fix)
    return pieces


def _first_difference(text: str, pieces: list[str]) -> str:
    at = 0
    for piece in pieces:
        if not text.startswith(piece, at):
            return f"at character {at} the text has {text[at : at + 40]!r}, the sentence is {piece[:40]!r}"
        at += len(piece)
    return f"the text from character {at} on is missing: {text[at : at + 40]!r}"


def tokenize_pieces(pieces: Sequence[str], backend: Tokenizer, max_tokens: int) -> tuple[list[Sentence], int]:
    """Tokenize pieces of text and split those of more than ``max_tokens`` tokens further.

    Returns:
        sentences, and how many pieces were too long.
    """
    sentences: list[Sentence] = []
    too_long = 0
    silent = ""
    for piece, encoding in zip(
        pieces, backend.encode_batch_fast(list(pieces), add_special_tokens=False), strict=True
    ):
        ids = encoding.ids
        if len(ids) > max_tokens:
            too_long += 1
            parts = _split_long(piece, backend, max_tokens)
        else:
            parts = [(piece, ids)]
        for part, part_ids in parts:
            if part_ids:
                sentences.append((silent + part, part_ids))
                silent = ""
            elif sentences:
                # Text a tokenizer has no tokens for (some drop spaces) stays with its neighbour.
                sentences[-1] = (sentences[-1][0] + part, sentences[-1][1])
            else:
                silent += part
    return sentences, too_long


def _split_long(text: str, backend: Tokenizer, max_tokens: int) -> list[Sentence]:
    """Cut after punctuation, else before white space, else anywhere between characters."""
    encoding = backend.encode(text, add_special_tokens=False)
    ends = list(accumulate((end for _, end in encoding.offsets), max))
    parts: list[Sentence] = []
    start = 0
    while start < len(text):
        last_token = bisect_right(ends, start) + max_tokens - 1
        limit = len(text) if last_token >= len(ends) - 1 else max(ends[last_token], start + 1)
        while True:
            cut = limit if limit == len(text) else _best_cut(text, start, limit)
            # Tokens of a cut text can differ from those of the whole, so they are counted again.
            ids = backend.encode(text[start:cut], add_special_tokens=False).ids
            if len(ids) <= max_tokens:
                break
            if cut - start == 1:
                raise DataError(
                    f"the character {text[start:cut]!r} alone has {len(ids)} tokens, more than "
                    f"max_tokens ({max_tokens})",
                    fix=f"set segmenter.options.max_tokens to {len(ids)} or more",
                )
            limit = start + max(1, (cut - start) * max_tokens // len(ids))
        parts.append((text[start:cut], ids))
        start = cut
    return parts


def _best_cut(text: str, start: int, limit: int) -> int:
    """The best place in ``(start, limit]`` to end a sentence; ``limit < len(text)``."""
    for cut in range(limit, start + (limit - start) // 2, -1):
        before, after = text[cut - 1], text[cut]
        if before in _STOPS and (after.isspace() or before == "\n" or not before.isascii()):
            return cut
    for cut in range(limit, start, -1):
        if cut > start and text[cut].isspace() and not text[cut - 1].isspace():
            return cut
    for cut in range(limit, start, -1):
        if not _joins(text[cut - 1], text[cut]):
            return cut
    return limit


def _joins(before: str, after: str) -> bool:
    """Whether a cut here would take a mark (accent, emoji part, line feed) from its character."""
    return (
        before == "\u200d"
        or after in "\u200d\ufe0e\ufe0f"
        or unicodedata.combining(after) != 0
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or (before == "\r" and after == "\n")
    )
