"""Documents from Parquet files, as most corpora on the hub are stored."""

import glob
import hashlib
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from pydantic import Field

import sentcompress
from sentcompress.errors import DataError, did_you_mean

ROWS = 1024
"""Read at once: a document may be large, and only the text's column is read at all."""


class ParquetDataset(sentcompress.Dataset):
    """One document for each row of Parquet files."""

    class Options(sentcompress.DatasetOptions):
        paths: list[str] = Field(min_length=1)
        """Files, folders (searched recursively for *.parquet) and globs."""
        column: str = "text"
        """Column of the text."""
        on_bad_row: Literal["error", "skip"] = "error"
        """``skip`` leaves out rows without text and says how many there were."""

    def documents(self) -> Iterator[sentcompress.Document]:
        """Yield the documents. Raises DataError naming the file, the row and the fix."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self._files()]
        return f"{super().fingerprint()}-{hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()}"

    def _files(self) -> list[Path]:
        found: dict[Path, None] = {}
        for name in self.options.paths:
            path = Path(name).expanduser()
            if path.is_dir():
                matches = sorted(path.rglob("*.parquet"))
            elif path.exists():
                matches = [path]
            else:
                matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"{name}: no Parquet file there", fix="correct data.options.paths")
            found.update(dict.fromkeys(matches))
        return list(found)

    def _all(self) -> Iterator[sentcompress.Document]:
        used = skipped = 0
        for path in self._files():
            for row, text in enumerate(self._column(path), start=1):
                if text is not None:
                    used += 1
                    yield sentcompress.Document(text, f"{path}:{row}")
                elif self.options.on_bad_row == "skip":
                    skipped += 1
                else:
                    raise DataError(
                        f"{path}:{row}: no text in column '{self.options.column}'",
                        fix="leave such rows out: --set data.options.on_bad_row=skip",
                    )
        if skipped and not used:
            raise DataError(f"column '{self.options.column}' has no text in any of the {skipped} rows")
        if skipped:
            print(f"{skipped} row(s) without text skipped", file=sys.stderr)

    def _column(self, path: Path) -> Iterator[str | None]:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._check_column(path, file.schema_arrow)
                for batch in file.iter_batches(ROWS, columns=[self.options.column]):
                    yield from batch.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            # Arrow's messages run over several lines; the first says what is wrong.
            what = str(error).strip().partition("\n")[0]
            raise DataError(f"{path}: cannot be read: {what}", fix="download or write it again") from None

    def _check_column(self, path: Path, schema: Any) -> None:
        column = self.options.column
        if column not in schema.names:
            raise DataError(
                f"{path}: no column '{column}'; there is {', '.join(map(repr, schema.names)) or 'none'}."
                f"{did_you_mean(column, schema.names)}",
                fix="name the column of the text: --set data.options.column=NAME",
            )
        kind = schema.field(column).type
        if pyarrow.types.is_dictionary(kind):  # how repeated strings are often stored
            kind = kind.value_type
        is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if not (is_text or pyarrow.types.is_null(kind)):
            raise DataError(
                f"{path}: column '{column}' is {kind}, not text", fix="name the column of the text"
            )
