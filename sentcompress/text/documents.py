"""The documents of a corpus while it is built: their texts in one file, and 24 bytes of memory for each. No torch."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sentcompress.text.heldout import text_hash


@dataclass(frozen=True)
class Span:
    """Where a document lies in ``text.bin``."""

    start: int
    stop: int
    source: str


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


class GrowingArray:
    """A ``.npy`` file of one dimension that grows at its end; whole once it is closed.

    Args:
        path: of the file.
        dtype: of its elements.
    """

    def __init__(self, path: Path, dtype: str = "int64") -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._header()
        self._begin = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Add ``[n]`` values."""
        np.ascontiguousarray(values, dtype=self.dtype).tofile(self._file)
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        if self._file.tell() != self._begin:  # numpy leaves room for a length of any size
            raise RuntimeError("numpy's header has changed its size")
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)},
        )


@contextmanager
def growing_arrays(folder: Path, *names: str) -> Iterator[dict[str, GrowingArray]]:
    """int64 arrays by name, in ``folder/NAME.npy``, closed at the end of the block."""
    with ExitStack() as stack:
        arrays = {name: GrowingArray(folder / f"{name}.npy") for name in names}
        for array in arrays.values():
            stack.callback(array.close)
        yield arrays
