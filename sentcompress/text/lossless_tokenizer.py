"""Any tokenizer as a lossless code: which bytes each token stands for, given what stands before it. No torch.

Tokenizers treat the beginning of a text in their own way: those of Llama 2's make put a space before it, and decoding
takes it away. Sentences are tokenized one by one, but only the first one begins a text. So the copies made here put
nothing before a text, and :class:`LosslessTokenizer` adds that space where a text does begin. Then a token always
stands for the same bytes, but for the first one of a text, which stands for those without the space.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer

from sentcompress.errors import CoverageError, DataError

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_WORDS = re.compile(r"\s*\S+|\s+")
_ORDINARY = [*map(chr, range(33, 127)), " a", "\na", "The owl sings,  it is 3.14 (A-Z)!\n\nWe hear  it.\n"]
"""Text that a tokenizer must keep as it is. Anything else may be spelt in byte tokens."""
_RARE = [
    "\t",
    "\r\n",
    "\u00e9E\u0301",
    "\ufb01\uff21\u2460\u00bd",
    "\u4e2d\u6587\u3002",
    "\u00a0\u3000\u2028",
]
_FIX = (
    "use a model whose tokenizer keeps every character: byte-level BPE, or SentencePiece with byte fallback"
)
_known: WeakKeyDictionary[Any, tuple[int, LosslessTokenizer]] = WeakKeyDictionary()


def lossless(tokenizer: Any) -> LosslessTokenizer:
    """The lossless code of a fast transformers tokenizer. It is made once; the tokenizer stays as it is.

    Raises:
        DataError: the tokenizer has no Rust core, or is inconsistent.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", fix="use a model that has a tokenizer.json"
        )
    size = len(tokenizer)
    if tokenizer not in _known or _known[tokenizer][0] != size:
        _known[tokenizer] = size, LosslessTokenizer(core.to_str(), frozenset(tokenizer.all_special_ids))
    return _known[tokenizer][1]


class LosslessTokenizer:
    """Encodes any text so that the bytes of its tokens, one after the other, are the text.

    Names of special tokens (``</s>``) are ordinary text; otherwise a document could put end marks into its own
    sentences. What the tokenizer would change or drop (a decomposed accent under NFC, the character ``▁``) is spelt
    in its byte tokens.

    Args:
        serialized: the ``tokenizer.json``.
        special_ids: tokens that stand for no text, besides those that the file calls special.

    Attributes:
        backend: the tokenizer's core. It puts nothing before a text, and neither truncates nor pads.
        prefix: what the tokenizer puts before a text: a space or nothing.
        vocab_size: the largest id plus one; there may be fewer tokens.
        token_sizes: ``[vocab_size]`` bytes of each token behind other text.

    Raises:
        DataError: the tokenizer is inconsistent.
    """

    def __init__(self, serialized: str, special_ids: frozenset[int] = frozenset()) -> None:
        self._made_of = serialized, special_ids
        settings = json.loads(serialized)
        self.prefix = " " if _without_prefix(settings) else ""
        for token in settings["added_tokens"]:
            token["lstrip"] = token["rstrip"] = False  # they would swallow the spaces beside them
        try:
            self.backend = Tokenizer.from_str(json.dumps(settings, ensure_ascii=False))
        except Exception as error:  # the library can build tokenizers that it cannot read
            raise DataError(
                f"the tokenizer is inconsistent: {error}",
                fix="copy tokenizer.json again from the source of the model",
            ) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        names = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(names.values(), default=-1) + 1
        self._bytes = [b""] * self.vocab_size
        for name, token in names.items():
            self._bytes[token] = name.encode("utf-8", "replace")
        _spell(self._bytes, settings, names)
        self._unknown = _unknown(settings["model"], names)
        special = {self._unknown, *special_ids}
        for token, added in self.backend.get_added_tokens_decoder().items():
            self._bytes[token] = added.content.encode("utf-8")
            special |= {token} if added.special else set()
        for name, token in names.items():
            # A few models pad with a character of ordinary text, such as "!".
            if token in special and len(name) > 1:
                self._bytes[token] = b""
        self._byte_tokens = {text: token for token, text in enumerate(self._bytes) if len(text) == 1}
        self.token_sizes = np.array(list(map(len, self._bytes)), dtype=np.int64)
        self._kept: dict[str, bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LosslessTokenizer, self._made_of

    # ---- text to tokens

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Tokens of a text, without special tokens.

        Args:
            begins: a text begins here; False if other text stands before it.

        Raises:
            DataError: the tokenizer has no tokens for a character.
        """
        return self.encode_batch([self.prefix + text if begins else text])[0] if text else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that stand behind other text.

        Raises:
            DataError: the tokenizer has no tokens for a character.
        """
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            encoding.ids if self._are(encoding.ids, text) else self._spelt(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _are(self, ids: Sequence[int], text: str) -> bool:
        return self.to_bytes(ids) == text.encode("utf-8")

    def _direct(self, text: str) -> list[int]:
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _spelt(self, text: str) -> list[int]:
        """Tokens of a text that the tokenizer would change: line by line, word by word, at last byte by byte."""
        found: list[int] = []
        if len(lines := text.splitlines(keepends=True)) > 1:
            for ids in self.encode_batch(lines):
                found += ids
            return found
        for word in _WORDS.findall(text):
            for kept, characters in groupby(word, self._keeps):
                run = "".join(characters)
                if not kept:
                    found += self._in_bytes(run)
                elif self._are(ids := self._direct(run), run):
                    found += ids
                else:
                    found += [token for character in run for token in self._direct(character)]
        return found

    def _keeps(self, character: str) -> bool:
        """Whether the tokens of a character stand for it."""
        if character not in self._kept:
            self._kept[character] = self._are(self._direct(character), character)
        return self._kept[character]

    def _in_bytes(self, text: str) -> list[int]:
        for character in text:
            if not self._has_bytes(character):
                what = f"{character!r} (U+{ord(character):04X})"
                raise DataError(f"the tokenizer has no token for {what}", fix=_FIX)
        return [self._byte_tokens[bytes([byte])] for byte in text.encode("utf-8")]

    def _has_bytes(self, character: str) -> bool:
        return all(bytes([byte]) in self._byte_tokens for byte in character.encode("utf-8"))

    # ---- tokens to text

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that tokens stand for behind other text; nothing for special tokens and unused ids."""
        table, size = self._bytes, self.vocab_size
        return b"".join([table[token] for token in ids if token < size])

    def decode(self, ids: Iterable[int], *, begins: bool = False) -> str:
        """Text of tokens. Bytes that are not UTF-8 become U+FFFD.

        Args:
            begins: they begin a text.
        """
        return self.streamed(begins=begins).add(ids, ends=True)

    def streamed(self, *, begins: bool = False, spaces: int = 0) -> TextStream:
        """Decodes tokens as they come.

        Args:
            begins: they begin a text.
            spaces: stand before the text already; the tokens may spell them again.
        """
        return TextStream(self, spaces + (len(self.prefix) if begins else 0))

    def byte_sizes(self, ids: Sequence[int], text: str) -> list[int]:
        """How many bytes of ``text`` each of its tokens stands for.

        Raises:
            CoverageError: the tokens are not those of the text.
        """
        spelt, wanted = self.to_bytes(ids), text.encode("utf-8")
        sizes = self.token_sizes[list(ids)].tolist()
        if spelt != wanted and self.prefix and spelt == self.prefix.encode() + wanted:
            first = next(n for n, size in enumerate(sizes) if size)
            sizes[first] -= len(self.prefix)
        elif spelt != wanted:
            raise CoverageError(
                f"the {len(ids)} scored tokens do not spell the text they stand for: {text[:60]!r}",
                fix="bits per byte cannot be measured with a tokenizer that changes the text",
            )
        return sizes

    # ---- whether it can be done

    def check(self) -> None:
        """Refuse a tokenizer that changes ordinary text: lower-casing, NFKC, WordPiece, words split at spaces.

        A character for which it has no token at all is found where a corpus has it.

        Raises:
            DataError: shows what it does to which text.
        """
        for text in [*_ORDINARY, *_RARE]:
            known = "".join(filter(self._knows, text))
            ids = self._direct(known)
            if self._are(ids, known):
                continue
            spelt = text in _RARE and all(self._keeps(c) or self._has_bytes(c) for c in known)
            if not spelt:
                became = self.to_bytes(ids).decode("utf-8", "replace")
                raise DataError(f"the tokenizer changes text: {known!r} comes back as {became!r}", fix=_FIX)

    def _knows(self, character: str) -> bool:
        """Whether a character has tokens, be they right or wrong. White space may be dropped, which is wrong."""
        ids = self._direct(character)
        return self._unknown not in ids and (bool(ids) or character.isspace())


class TextStream:
    """The text of tokens that come one by one; an incomplete character is held back.

    Args:
        tokenizer: of the tokens.
        spaces: how many spaces are left out at most, if the text begins with some.
    """

    def __init__(self, tokenizer: LosslessTokenizer, spaces: int) -> None:
        self._tokenizer, self._spaces = tokenizer, spaces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int], *, ends: bool = False) -> str:
        """The text that these tokens complete.

        Args:
            ends: nothing follows: bytes of an incomplete character become U+FFFD.
        """
        text = self._decoder.decode(self._tokenizer.to_bytes(ids), final=ends)
        while self._spaces and text:
            self._spaces = self._spaces - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return text


# ---- what a tokenizer.json says


def _parts(settings: Any) -> Iterator[dict[str, Any]]:
    """Every step of normalizer, pre-tokenizer and decoder, those in sequences too."""
    if isinstance(settings, dict):
        yield settings
        for value in settings.values():
            yield from _parts(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _parts(value)


def _without_prefix(settings: dict[str, Any]) -> bool:
    """Turn off every step that puts a space before a text; return whether there was one."""
    found = False
    for step in _parts([settings["normalizer"], settings["pre_tokenizer"]]):
        if step.get("type") == "Prepend":
            found |= bool(step["prepend"])
            step["prepend"] = ""
        elif step.get("type") == "Metaspace":
            found |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            found, step["add_prefix_space"] = True, False
    return found


def _spell(table: list[bytes], settings: dict[str, Any], names: dict[str, int]) -> None:
    """Write what the vocabulary's names stand for into a table of bytes by token."""
    steps = list(_parts([settings["normalizer"], settings["pre_tokenizer"], settings["decoder"]]))
    types = {step.get("type") for step in steps}
    if "ByteLevel" in types:
        byte_of = _byte_alphabet()
        for name, token in names.items():
            if all(character in byte_of for character in name):
                table[token] = bytes(map(byte_of.__getitem__, name))
        return
    space = next((step["replacement"] for step in steps if step.get("type") == "Metaspace"), None)
    for step in steps:
        if step.get("type") == "Replace" and step.get("pattern") == {"String": " "}:
            space = step["content"]
    falls_back = settings["model"].get("byte_fallback") or "ByteFallback" in types
    for name, token in names.items():
        if falls_back and (match := _BYTE_TOKEN.fullmatch(name)):
            table[token] = bytes([int(match[1], 16)])
        elif space:
            table[token] = name.replace(space, " ").encode("utf-8", "replace")


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies name bytes: printable ones themselves, then from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _unknown(model: dict[str, Any], names: dict[str, int]) -> int | None:
    """The token that stands for what the vocabulary lacks."""
    if (token := model.get("unk_id")) is not None:  # Unigram
        return int(token)
    return names.get(model.get("unk_token") or "")
