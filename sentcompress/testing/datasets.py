"""check_dataset: documents with text and source, always in the same order, and a stable fingerprint. No torch."""

from __future__ import annotations

import re
from itertools import islice, zip_longest
from typing import Any

from sentcompress.contracts import Dataset, DatasetOptions, Document
from sentcompress.testing.failures import Subject, shown

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_dataset(cls: type[Dataset], options: Any | None = None, *, documents: int = 1000) -> None:
    """Prove that a dataset keeps its contract's promises.

    At least one document with text; each a ``Document`` with a str and a source, without unpaired surrogates;
    sources that tell the documents apart; the same documents in the same order the second time and from a new
    instance; a fingerprint that is a str and stays the same, before and after reading and for a new instance.

    Args:
        options: raw options or an ``Options``.
        documents: how many are read, at most.

    Raises:
        CheckFailed: in one sentence.
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
    _look(subject, first)
    twin: Dataset = subject.build()
    for again, which in ((dataset, "the second time"), (twin, "from a new instance with the same options")):
        for number, (a, b) in enumerate(zip_longest(first, _read(subject, again, documents))):
            if a != b:
                subject.fail(
                    f"yields other documents {which}: number {number} is first {_shown(a)}, then {_shown(b)}",
                    "the order and the documents must always be the same",
                )
    for value, when in (
        (_fingerprint(subject, dataset), "after reading"),
        (_fingerprint(subject, twin), "for a new instance"),
    ):
        if value != before:
            subject.fail(
                f"has another fingerprint {when}: first {before!r}, then {value!r}",
                "it must change only when the documents would: it keys the token cache",
            )


def _fingerprint(subject: Subject, dataset: Dataset) -> str:
    value = subject.call("fingerprint()", dataset.fingerprint)
    if not isinstance(value, str) or not value:
        subject.fail(f"has the fingerprint {shown(value)}", "it must be a str that is not empty")
    return value


def _read(subject: Subject, dataset: Dataset, limit: int) -> list[Any]:
    return subject.call("documents()", lambda: list(islice(dataset.documents(), limit)))


def _look(subject: Subject, documents: list[Any]) -> None:
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
                "messages show the source: name the file and line, or the row",
            )
        if match := _SURROGATE.search(document.text):
            subject.fail(
                f"yields an unpaired surrogate, {match[0]!r} at character {match.start()} of {document.source}",
                "decode strictly, or replace it with U+FFFD",
            )
    if not any(document.text.strip() for document in documents):
        subject.fail(
            f"yields {len(documents)} document(s), none with text",
            "at least one document with text is expected",
        )
    sources = {document.source for document in documents}
    if 2 * len(sources) < len(documents):
        subject.fail(
            f"has only {len(sources)} source(s) for {len(documents)} documents, such as {shown(documents[0].source)}",
            "a source must tell which document a message is about",
        )


def _shown(document: Document | None) -> str:
    return "missing" if document is None else f"{shown(document.text)} from {shown(document.source)}"
