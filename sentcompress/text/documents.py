"""The documents of a corpus while it is built: their texts in one file, and 24 bytes of memory for each. No torch."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from sentcompress.text.encoding import Span
from sentcompress.text.heldout import text_hash


class DocumentFile:
    """Documents one after the other in ``text.bin``.

    Args:
        folder: of the corpus that is being built.

    Attributes:
        path: of the texts.
        ends: byte after each document.
        hashes: of all documents, one after the other.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "text.bin"
        self._sources = folder / "sources.txt"
        self.ends = array("q")
        self.hashes = bytearray()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def size(self) -> int:
        """Bytes of all texts."""
        return self.ends[-1] if self.ends else 0

    def start(self, index: int) -> int:
        """First byte of a document."""
        return self.ends[index - 1] if index else 0

    def fill(self, documents: Iterator[tuple[bytes, str]]) -> None:
        """Write texts and where they came from."""
        size = 0
        with self.path.open("wb") as texts, self._sources.open("w", encoding="ascii") as sources:
            for data, source in documents:
                texts.write(data)
                sources.write(json.dumps(source) + "\n")
                size += len(data)
                self.ends.append(size)
                self.hashes += text_hash(data)

    def spans(self) -> Iterator[Span]:
        """Where each document lies, in order."""
        start = 0
        for end, source in zip(self.ends, self.sources(), strict=True):
            yield Span(start, end, source)
            start = end

    def sources(self) -> Iterator[str]:
        """Where each document came from, in order."""
        with self._sources.open(encoding="ascii") as lines:
            yield from map(json.loads, lines)

    def texts(self, wanted: Callable[[int], bool]) -> Iterator[str]:
        """The texts of the documents whose numbers are wanted, in order."""
        with self.path.open("rb") as file:
            for index in range(len(self)):
                if wanted(index):
                    file.seek(self.start(index))
                    yield file.read(self.ends[index] - self.start(index)).decode("utf-8")

    def write_sources(self, path: Path, wanted: Iterator[bool]) -> None:
        """Write where the documents came from that are wanted, as a JSON list, and forget the rest."""
        with path.open("w", encoding="ascii") as file:
            file.write("[")
            for number, source in enumerate(
                s for s, kept in zip(self.sources(), wanted, strict=True) if kept
            ):
                file.write((", " if number else "") + json.dumps(source))
            file.write("]")
        self._sources.unlink()
