"""Reads text files in pieces, so that a file may be larger than memory; a document may not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sentcompress.datasets import _files
from sentcompress.errors import DataError

_CHUNK = 1 << 20
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
    try:
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
    except OSError as error:
        raise DataError(f"{shown}: cannot be read: {error.strerror}", fix="check the permissions") from None


def _parts(path: Path, separator: bytes | None, shown: str) -> Iterator[bytearray]:
    """What stands between separators. Raises DataError at a part that is too large, before it is whole in memory."""
    number = 1
    rest = bytearray()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if number == 1 and not rest:
                _files.refuse_other_encodings(chunk, shown)
            # Of a separator, all but the last byte may have come before.
            start = max(0, len(rest) - len(separator) + 1) if separator else 0
            rest += chunk
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
