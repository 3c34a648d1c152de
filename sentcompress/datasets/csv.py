"""``csv``: tables with a header, one column of which is text; plain or compressed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import LARGEST_DOCUMENT, SUFFIXES, Paths, files_fingerprint, find_files
from sentcompress.datasets._packed import read_pieces, without_packing
from sentcompress.datasets._texts import split_lines, without_mark
from sentcompress.errors import DataError, did_you_mean

_SUFFIXES = SUFFIXES["csv"]
_DELIMITERS = (",", ";", "\t", "|")


class CsvOptions(DatasetOptions):
    """Options of ``csv``."""

    paths: Paths
    """Files, folders (searched recursively for *.csv and *.tsv, compressed or not) and globs. The files are UTF-8."""
    field: str = "text"
    """Column of the text, as the first line names it."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """What separates columns; null: a tab in *.tsv, else the one of comma, semicolon, tab and bar that finds ``field``
    in the first line."""


class CsvDataset(Dataset):
    """One document for each row."""

    Options: ClassVar[type[Options]] = CsvOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming the file, the line and the fix."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        return files_fingerprint(super().fingerprint(), find_files(self.options.paths, _SUFFIXES))

    def _all(self) -> Iterator[Document]:
        # The largest field is a setting of the module; its default is 128 KiB.
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_DOCUMENT))
        for path in find_files(self.options.paths, _SUFFIXES, say=True):
            yield from self._rows(path)

    def _rows(self, path: Path) -> Iterator[Document]:
        lines = _text_lines(path)
        first = next(lines, "")
        delimiter = self.options.delimiter or self._delimiter(path, first)
        rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            if not header:
                return
            column = self._column(path, header)
            for row in rows:
                source = f"{path}:{rows.line_num}"
                if row and len(row) != len(header):
                    raise DataError(
                        f"{source}: {len(row)} column(s), and the header has {len(header)}",
                        fix="put quotation marks around text that contains the delimiter, or name that: "
                        "--set data.options.delimiter",
                    )
                if row:
                    yield Document(row[column], source)
        except csv.Error as error:
            raise DataError(
                f"{path}:{rows.line_num}: cannot be read as CSV: {error}",
                fix="write quotation marks within quoted text twice; a tab as delimiter is "
                """--set 'data.options.delimiter="\\t"'""",
            ) from None

    def _delimiter(self, path: Path, header: str) -> str:
        if without_packing(path.name).endswith(".tsv"):
            return "\t"
        for delimiter in _DELIMITERS:
            if self.options.field in next(csv.reader([header], delimiter=delimiter), []):
                return delimiter
        return max(_DELIMITERS, key=header.count)

    def _column(self, path: Path, header: list[str]) -> int:
        field = self.options.field
        if field not in header:
            raise DataError(
                f"{path}: no column '{field}' in the first line; there are "
                f"{', '.join(map(repr, header)) or 'none'}.{did_you_mean(field, header)}",
                fix="name the column of the text: --set data.options.field=NAME",
            )
        return header.index(field)


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a file with their ends, which may stand within a quoted text."""
    for number, line in enumerate(split_lines(without_mark(read_pieces(path)), str(path)), start=1):
        try:
            yield line.decode("utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8: byte 0x{line[error.start]:02x}",
                fix="convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8 old.csv > new.csv",
            ) from None
