"""The files of a corpus while it is built: the documents' texts, and arrays larger than memory. No torch."""

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
    """Where a document is in ``text.bin``."""

    start: int
    stop: int
    source: str


class DocumentFile:
    """Documents one after the other in ``text.bin``; each takes only 24 bytes of memory.

    Args:
        folder: the folder of the corpus.

    Attributes:
        path: the file of the texts.
        ends: the end of each document in the file, in bytes.
        hashes: the hashes of all documents, one after the other.
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
        """Total bytes of all texts."""
        return self.ends[-1] if self.ends else 0

    def start(self, index: int) -> int:
        """The start of a document in the file, in bytes."""
        return self.ends[index - 1] if index else 0

    def fill(self, documents: Iterator[tuple[bytes, str]]) -> None:
        """Write the texts and their sources."""
        size = 0
        with self.path.open("wb") as texts, self._sources.open("w", encoding="ascii") as sources:
            for data, source in documents:
                texts.write(data)
                sources.write(json.dumps(source) + "\n")
                size += len(data)
                self.ends.append(size)
                self.hashes += text_hash(data)

    def spans(self) -> Iterator[Span]:
        """Where each document is in the file, in order."""
        start = 0
        for end, source in zip(self.ends, self.sources(), strict=True):
            yield Span(start, end, source)
            start = end

    def sources(self) -> Iterator[str]:
        """The source of each document, in order."""
        with self._sources.open(encoding="ascii") as lines:
            yield from map(json.loads, lines)

    def texts(self, wanted: Callable[[int], bool]) -> Iterator[str]:
        """The texts of the documents whose index is wanted, in order."""
        with self.path.open("rb") as file:
            for index in range(len(self)):
                if wanted(index):
                    file.seek(self.start(index))
                    yield file.read(self.ends[index] - self.start(index)).decode("utf-8")

    def write_sources(self, path: Path) -> None:
        """Write the documents' sources as a JSON list, and delete the working file."""
        with path.open("w", encoding="ascii") as file:
            file.write("[")
            for number, source in enumerate(self.sources()):
                file.write((", " if number else "") + json.dumps(source))
            file.write("]")
        self._sources.unlink()


class GrowingArray:
    """A one-dimensional ``.npy`` file that grows at its end; valid once it is closed.

    Args:
        path: the file.
        dtype: the type of its elements.
    """

    def __init__(self, path: Path, dtype: str = "int64") -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._header()
        self._begin = self._file.tell()

    def append(self, values: np.ndarray) -> None:
        """Append ``[n]`` values."""
        np.ascontiguousarray(values, dtype=self.dtype).tofile(self._file)
        self.length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        if self._file.tell() != self._begin:  # numpy reserves room for any length
            raise RuntimeError("the size of the .npy header has changed")
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)},
        )


@contextmanager
def growing_arrays(folder: Path, *names: str) -> Iterator[dict[str, GrowingArray]]:
    """int64 arrays by name in ``folder/NAME.npy``, closed at the end of the block."""
    with ExitStack() as stack:
        arrays = {name: GrowingArray(folder / f"{name}.npy") for name in names}
        for array in arrays.values():
            stack.callback(array.close)
        yield arrays
