"""``text``: plain text files, folders and globs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import ClassVar

from pydantic import Field

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import SUFFIXES, Paths, files_fingerprint, find_files
from sentcompress.datasets._texts import read_documents

_SUFFIXES = SUFFIXES["text"]


class TextOptions(DatasetOptions):
    """Options of ``text``."""

    paths: Paths
    """Files, folders (searched recursively for *.txt and *.md) and globs. The files are UTF-8, compressed or not."""
    separator: str | None = Field(default=None, min_length=1)
    """What separates the documents of a file, such as ``<|endoftext|>``; null: a file is one document."""


class TextDataset(Dataset):
    """One document for each file, or several where they are separated."""

    Options: ClassVar[type[Options]] = TextOptions
    same_results_as = "41076d22bacd3408447824d56283799d"

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming the file and, if it is not UTF-8, the byte."""
        return islice(self._all(), self.options.max_documents)

    def _all(self) -> Iterator[Document]:
        separator = self.options.separator
        for path in find_files(self.options.paths, _SUFFIXES, say=True):
            for number, text in enumerate(read_documents(path, separator), start=1):
                yield Document(text, str(path) if separator is None else f"{path} (document {number})")

    def fingerprint(self) -> str:
        return files_fingerprint(super().fingerprint(), find_files(self.options.paths, _SUFFIXES))
