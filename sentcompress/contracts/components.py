"""The contracts that do not need torch: segmenter, dataset and metric, and the options every component has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

LARGEST_INT = 2**63 - 1
"""Seeds and sizes beyond it fit into no tensor."""


class UserInput(BaseModel):
    """Base of everything that users write: refuses unknown keys, and numbers that nobody can mean.

    These are NaN and infinity, whole numbers over 63 bits, and true or false where a number belongs.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_meant(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = list(_leaves_of_type(cls.model_fields[str(info.field_name)].annotation))
        if int not in kinds and float not in kinds:
            return value
        takes_bool = bool in kinds or Any in kinds
        for number in _leaves(value):
            if isinstance(number, bool) and not takes_bool:
                raise PydanticCustomError("number", "Input should be a number, not true or false")
            if isinstance(number, int) and abs(number) > LARGEST_INT:
                raise PydanticCustomError("number", "Input should be a number of at most 63 bits")
        return value


def _leaves(value: Any) -> Iterator[Any]:
    """A value, or those in lists and dictionaries."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _leaves_of_type(annotation: Any) -> Iterator[Any]:
    """The classes that an annotation such as ``list[int] | None`` is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _leaves_of_type(part)


class Options(UserInput):
    """Base of every component's options: unknown keys are refused, and values are frozen."""

    model_config = ConfigDict(frozen=True)


class Component:
    """Base of the components without torch. ``options`` defaults to the class' ``Options()``."""

    Options: ClassVar[type[Options]] = Options
    same_results_as: ClassVar[str] = ""
    """BLAKE2b digest (16 bytes, in hex) of an earlier source file that gave the same results for everything it could
    read: its token caches stay valid, and its runs can be resumed. Remove it when results change."""

    def __init__(self, options: Any | None = None) -> None:
        self.options: Any = self.Options() if options is None else options


class SegmenterOptions(Options):
    """Options that most segmenters share."""

    max_tokens: int = Field(default=64, ge=2, le=4096)
    """Longest sentence in tokens; longer ones are split further when they are tokenized, never truncated."""


class Segmenter(Component):
    """Splits text into sentences, before tokenization (paper section 3.1).

    ``"".join(split(text)) == text`` must hold for every string, and no sentence may be empty.
    """

    Options: ClassVar[type[Options]] = SegmenterOptions
    tokenizer: Any = None
    """The backbone's tokenizer, set by :meth:`prepare`."""

    @property
    def max_tokens(self) -> int:
        """Longest sentence in tokens; 64, as in the paper, unless the options say otherwise."""
        return int(getattr(self.options, "max_tokens", 64))

    def prepare(self, tokenizer: Any, documents: Iterable[str] | None = None) -> None:
        """Prepare for a corpus. Called once, before the first :meth:`split`.

        Args:
            tokenizer: the backbone's tokenizer.
            documents: training texts to learn from, or None if the state was loaded.
        """
        self.tokenizer = tokenizer

    def split(self, text: str) -> list[str]:
        """Return the sentences of ``text`` in order; joined, they must equal ``text``."""
        raise NotImplementedError(f"{type(self).__name__} must implement split(text)")

    def state(self) -> dict[str, Any]:
        """What :meth:`prepare` has learned, as JSON values; it is saved with the model."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""


@dataclass(frozen=True)
class Document:
    """A text and where it came from, which messages show."""

    text: str
    source: str


class DatasetOptions(Options):
    """Options that every dataset has."""

    heldout_documents: int = Field(default=20, ge=1)
    """Documents held out of training for evaluation: those whose text has the lowest hash."""
    max_documents: int | None = Field(default=None, ge=2)
    """Read at most this many documents."""


class Dataset(Component):
    """Yields the documents of a corpus, always in the same order."""

    Options: ClassVar[type[Options]] = DatasetOptions

    def documents(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            DataError: a document cannot be read; names file, line and fix.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement documents()")

    def fingerprint(self) -> str:
        """A string that changes whenever the documents change; part of the token cache's key.

        The default covers only the options. Datasets that read files add their names, sizes and modification times.
        """
        text = f"{type(self).__module__}.{type(self).__qualname__}:{self.options.model_dump_json()}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Reconstruction:
    """A held-out sentence, and what the model decodes greedily from its latent without teacher forcing."""

    reference: str
    hypothesis: str
    reference_ids: tuple[int, ...]
    hypothesis_ids: tuple[int, ...]


class Metric(Component):
    """Computes named figures from reconstructions of held-out sentences."""

    def compute(self, reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
        """Return figures by name; reports prefix them with the name of the metric."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute(reconstructions)")
