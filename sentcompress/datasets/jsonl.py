"""``jsonl``: one JSON object a line, plain or compressed (``.gz``, ``.zst``), such as WanJuan's files."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import (
    LARGEST_DOCUMENT,
    files_fingerprint,
    find_files,
    refuse_other_encodings,
)
from sentcompress.errors import DataError, did_you_mean

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 12  # a frame of nothing but repetition grows 30,000 times
LONGEST_LINE = LARGEST_DOCUMENT


class JsonlOptions(DatasetOptions):
    """Options of ``jsonl``."""

    paths: list[str] = Field(min_length=1)
    """Files, folders (searched recursively for *.jsonl, *.jsonl.gz and *.jsonl.zst) and globs."""
    field: str = "text"
    """Key of the text in each object (``content`` in WanJuan)."""
    on_bad_line: Literal["error", "skip"] = "error"
    """``skip`` leaves out lines that cannot be used and says how many there were."""


class JsonlDataset(Dataset):
    """One document for each line."""

    Options: ClassVar[type[Options]] = JsonlOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming the file, the line and the fix."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        return files_fingerprint(super().fingerprint(), find_files(self.options.paths, _SUFFIXES))

    def _all(self) -> Iterator[Document]:
        used = skipped = 0
        first_error: DataError | None = None
        for path in find_files(self.options.paths, _SUFFIXES, say=True):
            with closing(_lines(path)) as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    source = f"{path}:{number}"
                    try:
                        text = self._text(line, source)
                    except DataError as error:
                        if self.options.on_bad_line == "error":
                            raise
                        skipped += 1
                        first_error = first_error or error
                        continue
                    used += 1
                    yield Document(text, source)
        if first_error is not None:
            if not used:
                raise DataError(f"all {skipped} lines were bad; the first: {first_error.message}") from None
            print(f"{skipped} bad line(s) skipped; the first: {first_error.message}", file=sys.stderr)

    def _text(self, line: bytes, source: str) -> str:
        """The document of a line. Raises DataError saying what is wrong with it."""
        fix = "correct the line, or leave such lines out: --set data.options.on_bad_line=skip"
        try:
            # Decoded here: json guesses the encoding of bytes, and would read a first line of UTF-16.
            value: Any = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: not UTF-8 (byte {error.start} of the line)", fix=fix) from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{source}: broken JSON: {error.msg} at character {error.pos + 1}", fix=fix
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: JSON that cannot be read: {error}", fix=fix) from None
        if not isinstance(value, dict):
            raise DataError(f"{source}: a JSON object is needed, this is {type(value).__name__}", fix=fix)
        field = self.options.field
        if field not in value:
            raise DataError(
                f"{source}: no field '{field}'; the line has {', '.join(map(repr, value)) or 'none'}."
                f"{did_you_mean(field, value)}",
                fix="name the field of the text: --set data.options.field=NAME",
            )
        text = value[field]
        if not isinstance(text, str):
            raise DataError(f"{source}: field '{field}' is {type(text).__name__}, not text", fix=fix)
        return text


def _lines(path: Path) -> Generator[bytes, None, None]:
    """Lines of a plain or compressed file. Raises DataError when it cannot be read to its end."""
    try:
        chunks = _zstd_chunks(path) if path.name.endswith(".zst") else _plain_chunks(path)
        yield from _utf8_lines(_split_lines(chunks, path), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut short: {error}", fix="download or write it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _utf8_lines(lines: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """The lines, a byte order mark removed from the first. Raises DataError if it shows another encoding."""
    for number, line in enumerate(lines):
        if number == 0:
            refuse_other_encodings(line, str(path))
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield line


def _plain_chunks(path: Path) -> Iterator[bytes]:
    """Pieces of a plain or gzip file."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        while data := file.read(_CHUNK):
            yield data


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompressed pieces of a file of one or more zstd frames."""
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path}: reading .zst needs the package zstandard", fix="pip install 'sentcompress[data]'"
        ) from None
    # Web-scale corpora are often packed with --long=31.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    fresh = True
    with path.open("rb") as file:
        try:
            while data := file.read(_ZSTD_CHUNK):
                while data:
                    yield frame.decompress(data)
                    fresh, data = frame.eof, frame.unused_data if frame.eof else b""
                    if frame.eof:
                        frame = decompressor.decompressobj()
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: damaged: {error}", fix="download or write it again") from None
    if not fresh:
        raise DataError(f"{path}: damaged or cut short", fix="download or write it again")


def _split_lines(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Raises DataError at a line over ``LONGEST_LINE``, before it is whole in memory."""
    parts: list[bytes] = []
    size, number = 0, 1
    for chunk in chunks:
        for place, line in enumerate(chunk.split(b"\n")):
            if place:  # the one before is whole
                yield b"".join(parts)
                parts, size = [], 0
                number += 1
            parts.append(line)
            size += len(line)
            if size > LONGEST_LINE:
                raise DataError(
                    f"{path}:{number}: a line of over {LONGEST_LINE >> 20} MiB",
                    fix="cut it into documents of a line each; if it was not meant to be, the file may be a zip bomb",
                )
    yield b"".join(parts)
