"""``parquet``: the rows of Parquet and Arrow (Feather, IPC) files, one column of which is text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import LARGEST_DOCUMENT, SUFFIXES, Paths, files_fingerprint, find_files
from sentcompress.datasets._packed import start_of
from sentcompress.datasets._texts import text_of
from sentcompress.errors import DataError, did_you_mean

_SUFFIXES = SUFFIXES["parquet"]
_ROWS = 64
"""Rows that are in memory together: documents may be large."""


class ParquetOptions(DatasetOptions):
    """Options of ``parquet``."""

    paths: Paths
    """Files, folders (searched recursively for *.parquet, *.arrow, *.feather and *.ipc) and globs."""
    field: str = "text"
    """Column of the text."""


class ParquetDataset(Dataset):
    """One document for each row; a null is an empty document."""

    Options: ClassVar[type[Options]] = ParquetOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming the file, the row or column, and the fix."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        return files_fingerprint(super().fingerprint(), find_files(self.options.paths, _SUFFIXES))

    def _all(self) -> Iterator[Document]:
        try:
            import pyarrow
        except ImportError:
            raise DataError(
                "dataset 'parquet' needs the package pyarrow", fix="pip install 'sentcompress[data]'"
            ) from None
        for path in find_files(self.options.paths, _SUFFIXES, say=True):
            try:
                number = 0
                for column in _columns(path, self.options.field):
                    for value in column:
                        number += 1
                        source = f"{path} row {number}"
                        yield Document(self._text(value, source), source)
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(
                    f"{path}: cannot be read: {str(error).strip().splitlines()[0]}",
                    fix="download or write it again, and check its permissions",
                ) from None

    def _text(self, value: Any, source: str) -> str:
        # A view of the file's bytes: whether they are UTF-8 is checked here.
        data = None if not value.is_valid else value.as_buffer().to_pybytes()
        if data is not None and len(data) > LARGEST_DOCUMENT:
            raise DataError(
                f"{source}: a document of over {LARGEST_DOCUMENT >> 20} MiB",
                fix="cut it into several rows",
            )
        return text_of(data, source, self.options.field)


def _columns(path: Path, field: str) -> Iterator[Any]:
    """The column of a file in pieces, as an array of binary.

    Raises:
        DataError: the file is neither Parquet nor Arrow, or has no such column of text.
    """
    import pyarrow as arrow
    import pyarrow.parquet

    start = start_of(path, 8)
    if start.startswith(b"PAR1"):
        with pyarrow.parquet.ParquetFile(path) as file:
            kind = _column_type(path, file.schema_arrow, field)
            for batch in file.iter_batches(_ROWS, columns=[field]):
                yield _binary(batch.column(field), kind)
        return
    with arrow.memory_map(str(path)) as source:
        if start.startswith(b"ARROW1"):
            reader = arrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        elif start.startswith(b"\xff\xff\xff\xff"):  # a stream, which datasets writes
            reader = batches = arrow.ipc.open_stream(source)
        else:
            raise DataError(
                f"{path}: neither a Parquet nor an Arrow file" + ("" if start else ": it is empty"),
                fix="download or write it again; read other files with --data, or with text, jsonl or csv",
            )
        kind = _column_type(path, reader.schema, field)
        for batch in batches:
            yield _binary(batch.column(field), kind)


def _column_type(path: Path, schema: Any, field: str) -> Any:
    import pyarrow.types as types

    if field not in schema.names:
        raise DataError(
            f"{path}: no column '{field}'; there are {', '.join(map(repr, schema.names)) or 'none'}."
            f"{did_you_mean(field, schema.names)}",
            fix="name the column of the text: --set data.options.field=NAME",
        )
    if schema.names.count(field) > 1:
        raise DataError(
            f"{path}: has the column '{field}' twice", fix="write it with one column of that name"
        )
    kind = schema.field(field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind
    is_text = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_null,
    )
    if not any(check(plain) for check in is_text):
        raise DataError(
            f"{path}: column '{field}' is {kind}, not text",
            fix="name a column of text: --set data.options.field=NAME",
        )
    return kind


def _binary(column: Any, kind: Any) -> Any:
    """Whatever holds text as large binary, without checking it."""
    import pyarrow as arrow

    if arrow.types.is_dictionary(kind):  # decoded as binary, because views cannot be
        values = column.dictionary.cast(arrow.large_binary())
        column = arrow.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    return column.cast(arrow.large_binary())
