"""``jsonl``: JSON lines, and JSON files that hold a list of objects; plain or compressed, such as WanJuan's files."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets import _files
from sentcompress.datasets._files import SUFFIXES, Paths, files_fingerprint, find_files
from sentcompress.datasets._packed import read_pieces, without_packing
from sentcompress.datasets._texts import split_lines, without_mark
from sentcompress.errors import DataError, did_you_mean

_SUFFIXES = SUFFIXES["jsonl"]
_LIST = re.compile(rb"\s*\[\s*([{\]]|\Z)")
"""How a list of objects begins; a line may be a list of something else, which is then named as a bad line."""
_BETWEEN = re.compile(r"[\s,]*")


class JsonlOptions(DatasetOptions):
    """Options of ``jsonl``."""

    paths: Paths
    """Files, folders (searched recursively for *.jsonl, *.ndjson and *.jsonlines, compressed or not) and globs. A file
    may also hold one list of objects, as *.json files do, which must be named or matched by a glob."""
    field: str = "text"
    """Key of the text in each object (``content`` in WanJuan)."""
    on_bad_line: Literal["error", "skip"] = "error"
    """``skip`` leaves out lines that cannot be used and says how many there were."""


class JsonlDataset(Dataset):
    """One document for each line."""

    Options: ClassVar[type[Options]] = JsonlOptions
    same_results_as = "3189008cc022cfaf8f498d1f437c2e05"

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming the file, the line and the fix."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        return files_fingerprint(super().fingerprint(), find_files(self.options.paths, _SUFFIXES))

    def _all(self) -> Iterator[Document]:
        used = skipped = 0
        first_error: DataError | None = None
        for path in find_files(self.options.paths, _SUFFIXES, say=True):
            with closing(_values(path)) as values:
                for source, value in values:
                    try:
                        text = self._text(value, source)
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

    def _text(self, value: Any, source: str) -> str:
        """The document of a line. Raises DataError saying what is wrong with it."""
        if isinstance(value, bytes):
            value = _parsed(value, source)
        if not isinstance(value, dict):
            raise DataError(
                f"{source}: a JSON object is needed, this is {_JSON_NAMES[type(value)]}", fix=_FIX
            )
        field = self.options.field
        if field not in value:
            raise DataError(
                f"{source}: no field '{field}'; the line has {', '.join(map(repr, value)) or 'none'}."
                f"{did_you_mean(field, value)}",
                fix="name the field of the text: --set data.options.field=NAME",
            )
        text = value[field]
        if not isinstance(text, str):
            raise DataError(f"{source}: field '{field}' is {_JSON_NAMES[type(text)]}, not text", fix=_FIX)
        return text


_FIX = "correct the line, or leave such lines out: --set data.options.on_bad_line=skip"
_JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _parsed(line: bytes, source: str) -> Any:
    try:
        # Decoded here: json guesses the encoding of bytes, and would read a first line of UTF-16.
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 (byte {error.start} of the line)", fix=_FIX) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: broken JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}", fix=_FIX
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: JSON that cannot be read: {error}", fix=_FIX) from None


def _values(path: Path) -> Generator[tuple[str, Any], None, None]:
    """What stands in a file, with its place: lines as bytes, or the values of a file that is not one of lines."""
    pieces = without_mark(read_pieces(path))
    first = next((piece for piece in pieces if piece.strip()), b"")
    pieces = chain([first], pieces)
    if _LIST.match(first) or (without_packing(path.name).endswith(".json") and not _is_a_value(first)):
        yield from _elements(pieces, path)
        return
    for number, line in enumerate(split_lines(pieces, str(path)), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def _is_a_value(start: bytes) -> bool:
    """Whether the first line is JSON by itself, as it is in a file of JSON lines that is called .json."""
    try:
        json.loads(start.lstrip().partition(b"\n")[0].decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _elements(pieces: Iterator[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list, or values one after the other, read a piece at a time.

    Raises:
        DataError: what stands there is not JSON, or one value is longer than a line may be.
    """
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")().decode
    text, number, listed, ended = "", 0, False, False
    wanted = 0  # characters, before it is worth trying again
    for piece in chain(pieces, [b""]):
        last = not piece
        try:
            text += decode(piece, last)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 near element {number + 1}: {error.reason}", fix="convert it to UTF-8"
            ) from None
        if len(text) < wanted and not last:
            continue
        place = 0
        while True:
            place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
            if not number and not listed and text.startswith("[", place):
                listed, place = True, place + 1
                continue
            if listed and text.startswith("]", place):
                ended, place = True, place + 1
                continue
            if place == len(text):
                break
            source = f"{path} (element {number + 1})"
            try:
                value, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                if last or ended or not isinstance(error, json.JSONDecodeError):
                    raise _broken(source, error) from None
                break
            if end == len(text) and not last:  # a number may go on
                break
            number, place = number + 1, end
            yield source, value
        text = text[place:]
        wanted = 2 * len(text)
        if len(text) > _files.LARGEST_DOCUMENT:
            raise DataError(
                f"{path} (element {number + 1}): over {_files.LARGEST_DOCUMENT >> 20} MiB, or broken JSON",
                fix="write it as JSON lines: one object a line",
            )
    if listed and not ended:
        raise DataError(
            f"{path}: the list has no end after element {number}", fix="download or write it again"
        )


def _broken(source: str, error: Exception) -> DataError:
    reason = getattr(error, "msg", str(error))
    return DataError(
        f"{source}: broken JSON: {reason}", fix="correct the file; one object a line is read too"
    )
