"""Dataset: where documents come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from sentcompress.contracts.options import Component, Options


@dataclass(frozen=True)
class Document:
    """One text, and where it came from (shown in messages)."""

    text: str
    source: str


class DatasetOptions(Options):
    """Options every dataset has."""

    heldout_documents: int = Field(default=20, ge=1)
    """Documents kept out of training for evaluation: those with the lowest hash of their text."""
    max_documents: int | None = Field(default=None, ge=2)
    """Read at most this many documents."""


class Dataset(Component):
    """A corpus, document by document, always in the same order."""

    Options: ClassVar[type[Options]] = DatasetOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises DataError naming file, line and fix when one cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} must implement documents()")

    def fingerprint(self) -> str:
        """A string that changes when the documents would; part of the token cache's key.

        The default covers the options only; datasets that read files add names, sizes and change times.
        """
        text = f"{type(self).__module__}.{type(self).__qualname__}:{self.options.model_dump_json()}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
