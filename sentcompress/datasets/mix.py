"""``mix``: several datasets as one, each with a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sentcompress.contracts import Dataset, DatasetOptions, Document, Options
from sentcompress.errors import DataError, RecipeError
from sentcompress.registry import get_registry

_WHOLE = 2**64
_FIELD = "data.options.sources"
_MOST = 1000


class Source(BaseModel):
    """One of the datasets."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Registered name of the dataset."""
    options: dict[str, Any] = {}
    """Its options; its own ``heldout_documents`` has no meaning here."""
    weight: float = 1.0
    """How often each document is read in an epoch: 2 is twice, 0.3 takes 30% of them, by a hash of their text."""


class MixOptions(DatasetOptions):
    """Options of ``mix``."""

    sources: list[Source] = Field(min_length=1)
    """The datasets, each with ``name``, ``options`` and ``weight``."""

    @field_validator("sources")
    @classmethod
    def _options_of_each(cls, sources: list[Source]) -> list[Source]:
        for number, source in enumerate(sources):
            if not 0 < source.weight <= _MOST:  # nor is it so for NaN
                raise RecipeError(
                    f"{_FIELD}.{number}.weight: must be above 0 and at most {_MOST} (got {source.weight:g})",
                    fix="2 reads each document twice, 0.3 takes 30% of them; to leave a source out, delete its entry",
                )
            get_registry().options("dataset", source.name, source.options, f"{_FIELD}.{number}.options")
        return sources


class MixDataset(Dataset):
    """The documents of all sources, one source after the other; training shuffles them."""

    Options: ClassVar[type[Options]] = MixOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents. Raises what the sources raise."""
        return islice(self._all(), self.options.max_documents)

    def fingerprint(self) -> str:
        parts = [super().fingerprint(), *(dataset.fingerprint() for dataset, _ in self._sources())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def _sources(self) -> list[tuple[Dataset, float]]:
        create = get_registry().create
        return [(create("dataset", s.name, s.options), s.weight) for s in self.options.sources]

    def _all(self) -> Iterator[Document]:
        for number, (dataset, weight) in enumerate(self._sources()):
            times, share = divmod(weight, 1)
            read = taken = 0
            for document in dataset.documents():
                once_more = share > 0 and _place(document.text) < share
                read, taken = read + 1, taken + int(times) + once_more
                for _ in range(int(times) + once_more):
                    yield document
            if read and not taken:
                raise DataError(
                    f"{_FIELD}.{number}.weight: {weight:g} takes none of the {read} document(s) of that source "
                    f"('{self.options.sources[number].name}')",
                    fix="raise that weight (1 takes each document once), or delete the source's entry",
                )


def _place(text: str) -> float:
    """A text's place between 0 and 1, by its hash: the same documents are taken whatever stands beside them."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / _WHOLE
