"""check_dataset: documents with text and source in a stable order, and a stable fingerprint. No torch."""

from __future__ import annotations

import re
from itertools import islice, zip_longest
from typing import Any

from sentcompress.contracts import Dataset, DatasetOptions, Document
from sentcompress.testing.checks import Subject, shown

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_dataset(cls: type[Dataset], options: Any | None = None, *, documents: int = 1000) -> None:
    """Check that a dataset fulfils its contract.

    It must yield at least one document with text. Each must be a ``Document`` with a str and a source, without unpaired
    surrogates, and the sources must tell the documents apart. A second reading and a new instance must yield the same
    documents in the same order. The fingerprint must be a str that stays the same, also for a new instance.

    Args:
        options: raw options or an ``Options`` instance.
        documents: read at most this many.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("dataset", cls, options)
    if not isinstance(subject.options, DatasetOptions):
        subject.fail(
            "has Options without heldout_documents and max_documents",
            "they must be a subclass of sentcompress.DatasetOptions",
        )
    dataset: Dataset = subject.build()
    before = _fingerprint(subject, dataset)
    first = _read(subject, dataset, documents)
    _check_documents(subject, first)
    other: Dataset = subject.build()
    for again, which in ((dataset, "the second time"), (other, "from a new instance with the same options")):
        for number, (a, b) in enumerate(zip_longest(first, _read(subject, again, documents))):
            if a != b:
                subject.fail(
                    f"yields different documents {which}: number {number} is first {_shown(a)}, then {_shown(b)}",
                    "documents and their order must always be the same",
                )
    for value, when in (
        (_fingerprint(subject, dataset), "after reading"),
        (_fingerprint(subject, other), "for a new instance"),
    ):
        if value != before:
            subject.fail(
                f"has a different fingerprint {when}: first {before!r}, then {value!r}",
                "it must change only when the documents change, since it is part of the token cache's key",
            )


def _fingerprint(subject: Subject, dataset: Dataset) -> str:
    value = subject.call("fingerprint()", dataset.fingerprint)
    if not isinstance(value, str) or not value:
        subject.fail(f"has the fingerprint {shown(value)}", "it must be a non-empty str")
    return value


def _read(subject: Subject, dataset: Dataset, limit: int) -> list[Any]:
    return subject.call("documents()", lambda: list(islice(dataset.documents(), limit)))


def _check_documents(subject: Subject, documents: list[Any]) -> None:
    for number, document in enumerate(documents):
        if not isinstance(document, Document):
            subject.fail(
                f"yields {shown(document)} as document {number}",
                "it must be a sentcompress.Document(text, source)",
            )
        for name in ("text", "source"):
            value = getattr(document, name)
            if not isinstance(value, str):
                subject.fail(f"yields document {number} with {name} {shown(value)}", f"{name} must be a str")
        if not document.source.strip():
            subject.fail(
                f"yields document {number} ({shown(document.text)}) without a source",
                "messages show it, so name the file and line, or the row",
            )
        if match := _SURROGATE.search(document.text):
            subject.fail(
                f"yields an unpaired surrogate, {match[0]!r} at character {match.start()} of {document.source}",
                "decode strictly, or replace surrogates with U+FFFD",
            )
    if not any(document.text.strip() for document in documents):
        subject.fail(
            f"yields {len(documents)} document(s), none of them with text",
            "at least one document must contain text",
        )
    sources = {document.source for document in documents}
    if 2 * len(sources) < len(documents):
        subject.fail(
            f"has only {len(sources)} source(s) for {len(documents)} documents, such as {shown(documents[0].source)}",
            "a source must identify the document that a message is about",
        )


def _shown(document: Document | None) -> str:
    return "missing" if document is None else f"{shown(document.text)} from {shown(document.source)}"
