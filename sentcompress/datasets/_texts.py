"""Reads text files in pieces, so that a file may be larger than memory; a document may not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sentcompress.datasets import _files
from sentcompress.datasets._packed import read_pieces
from sentcompress.errors import DataError

_MARK = b"\xef\xbb\xbf"


def read_documents(path: Path, separator: str | None = None, shown: str | None = None) -> Iterator[str]:
    """The documents of a UTF-8 file, a byte order mark removed; without a separator it is one.

    Args:
        shown: its name in messages.

    Raises:
        DataError: it cannot be read, is not UTF-8 (naming the byte), or has a document over ``LARGEST_DOCUMENT``.
    """
    shown = shown or str(path)
    # No character of UTF-8 begins inside another one, so what is a separator in the bytes is one in the text.
    mark = None if separator is None else separator.encode("utf-8")
    offset = line = 0
    for data in _parts(path, mark, shown):
        skipped = len(_MARK) if offset == 0 and data.startswith(_MARK) else 0
        try:
            text = data[skipped:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = skipped + error.start
            line += data.count(b"\n", 0, at) + 1
            raise DataError(
                f"{shown}: not UTF-8: byte 0x{data[at]:02x} at offset {offset + at} (line {line})",
                fix="convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8 old.txt > new.txt",
            ) from None
        if mark is not None:
            line += data.count(b"\n") + mark.count(b"\n")
            offset += len(data) + len(mark)
        del data  # not beside the text while that is worked with
        yield text


def _parts(path: Path, separator: bytes | None, shown: str) -> Iterator[bytearray]:
    """What stands between separators. Raises DataError at a part that is too large, before it is whole in memory."""
    number = 1
    rest = bytearray()
    for piece in read_pieces(path, shown):
        # Of a separator, all but the last byte may have come before.
        start = max(0, len(rest) - len(separator) + 1) if separator else 0
        rest += piece
        begin = 0
        while separator and (end := rest.find(separator, start)) >= 0:
            _check_size(end - begin, number, separator, shown)
            yield rest[begin:end]
            begin = start = end + len(separator)
            number += 1
        del rest[:begin]
        _check_size(len(rest), number, separator, shown)
    yield rest


def _check_size(size: int, number: int, separator: bytes | None, shown: str) -> None:
    limit = f"{_files.LARGEST_DOCUMENT >> 20} MiB"
    if size <= _files.LARGEST_DOCUMENT:
        return
    if separator is None:
        raise DataError(
            f"{shown}: a file that is one document of over {limit}",
            fix="name what separates its documents (data.options.separator), or cut it into several files",
        )
    raise DataError(
        f"{shown} (document {number}): over {limit} without a separator",
        fix="correct data.options.separator, or put separators between the parts of that document",
    )


def without_mark(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of a file, a byte order mark removed from the first."""
    for number, piece in enumerate(pieces):
        yield piece if number else piece.removeprefix(_MARK)


def split_lines(pieces: Iterable[bytes], shown: str) -> Iterator[bytes]:
    """Lines without their ends. Raises DataError at one over ``LARGEST_DOCUMENT``, before it is whole in memory."""
    parts: list[bytes] = []
    size, number = 0, 1
    for piece in pieces:
        for place, line in enumerate(piece.split(b"\n")):
            if place:  # the one before is whole
                yield b"".join(parts)
                parts, size = [], 0
                number += 1
            parts.append(line)
            size += len(line)
            if size > _files.LARGEST_DOCUMENT:
                raise DataError(
                    f"{shown}:{number}: a line of over {_files.LARGEST_DOCUMENT >> 20} MiB",
                    fix="cut it into documents of a line each; if it was not meant to be, the file may be a zip bomb",
                )
    yield b"".join(parts)


def text_of(value: Any, source: str, field: str) -> str:
    """The text of a table's cell: null is an empty text, and bytes are UTF-8.

    Raises:
        DataError: it is something else.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}: column '{field}' is not UTF-8: byte 0x{value[error.start]:02x} at offset {error.start}",
                fix="write the column again as text, or name another one: --set data.options.field=NAME",
            ) from None
    if not isinstance(value, str):
        raise DataError(
            f"{source}: column '{field}' is {type(value).__name__}, not text",
            fix="name a column of text: --set data.options.field=NAME",
        )
    return value
