"""check_segmenter: lossless, deterministic, fast, with a state that survives JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from sentcompress.contracts import Segmenter
from sentcompress.errors import PluginError
from sentcompress.testing.checks import CheckFailed, Subject, place_of, shown
from sentcompress.testing.texts import NASTY, generated, hostile, ordinary, tiny_tokenizer
from sentcompress.text.segmentation import checked_split

_DOCUMENTS = 20
"""Documents that it is prepared with."""


def check_segmenter(
    segmenter: Segmenter | type[Segmenter],
    options: Any | None = None,
    *,
    tokenizer: Any | None = None,
    characters: int = 1_000_000,
    seconds: float = 20.0,
) -> None:
    """Check that a segmenter fulfils its contract.

    It is prepared as for a corpus. For difficult and generated texts, ``split`` must then return a list of non-empty
    strings that joined are the text. It must do the same the second time, and so must a new instance with the same
    ``state()``, passed through JSON. Long texts, ordinary and hostile, must be split in time.

    Args:
        segmenter: the class, or an instance.
        options: only for a class: raw options or an ``Options`` instance.
        tokenizer: prepares the segmenter; a tiny byte-level one by default.
        characters: length of the ordinary text, and of all hostile texts together.
        seconds: CPU time allowed for each of the two.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("segmenter", segmenter, options)
    own: Segmenter = subject.build() if isinstance(segmenter, type) else segmenter
    tokenizer = tokenizer or tiny_tokenizer()
    known = bool(subject.call("state()", own.state))
    documents = None if known else (ordinary(2000, seed) for seed in range(_DOCUMENTS))
    subject.call("prepare(tokenizer, documents)", lambda: own.prepare(tokenizer, documents))
    if not isinstance(own.max_tokens, int) or own.max_tokens < 2:
        subject.fail(f"has max_tokens {own.max_tokens!r}", "it must be an integer of at least 2")

    # The time limit is in wall-clock time and the machine may be busy; speed is measured in CPU time.
    limit = 3 * seconds
    texts = [*NASTY, *generated()]
    cuts = [_split(own, text, limit) for text in texts]
    for text, pieces in zip(texts, cuts, strict=True):
        _same(
            subject,
            text,
            pieces,
            _split(own, text, limit),
            "splits the same text differently the second time",
        )
    other = _from_json(subject, own, tokenizer)
    for text, pieces in zip(texts, cuts, strict=True):
        what = "splits differently after load_state(state()) on a new instance"
        _same(subject, text, pieces, _split(other, text, limit), what)

    _in_time(subject, own, {"ordinary text": ordinary(characters)}, seconds)
    _in_time(subject, own, hostile(characters), seconds)


def _split(segmenter: Segmenter, text: str, limit: float) -> list[str]:
    """Split as every run does, with its checks and messages."""
    try:
        return checked_split(text, segmenter, limit)
    except PluginError as error:
        message = " ".join(error.message.split())
        if error.__cause__ is not None:
            message += place_of(error.__cause__, type(segmenter))
        raise CheckFailed(
            f"{message} (the text: {shown(text)}); split(text) must return non-empty strings that joined are "
            "the text"
        ) from error.__cause__


def _same(subject: Subject, text: str, first: list[str], second: list[str], what: str) -> None:
    if first == second:
        return
    number = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    subject.fail(
        f"{what}: sentence {number} of {shown(text)} is first {shown(first[number])}, then "
        f"{shown(second[number])}",
        "equal text must give equal sentences",
    )


def _from_json(subject: Subject, segmenter: Segmenter, tokenizer: Any) -> Segmenter:
    """A new instance with the state of another, through JSON."""
    state = subject.call("state()", segmenter.state)
    expected = "it must be a dict of JSON values (str keys; lists instead of tuples or sets)"
    if not isinstance(state, dict):
        subject.fail(f"returns {shown(state)} from state()", expected)
    try:
        copy = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        subject.fail(f"has a state() that JSON cannot hold ({error})", expected)
    for key, value in state.items():
        if copy.get(key) != value:
            subject.fail(f"has {key!r}: {shown(value)} in state(), which JSON changes", expected)
    other: Segmenter = subject.build()
    subject.call("load_state(state)", lambda: other.load_state(copy))
    subject.call("prepare(tokenizer, None)", lambda: other.prepare(tokenizer, None))
    again = subject.call("state()", other.state)
    if again != state:
        subject.fail(
            f"has a different state() after load_state: {shown(again)} instead of {shown(state)}",
            "load_state must restore all that state() returned",
        )
    return other


def _in_time(subject: Subject, segmenter: Segmenter, texts: dict[str, str], seconds: float) -> None:
    began = time.process_time()
    for what, text in texts.items():
        before = time.process_time()
        _split(segmenter, text, 3 * seconds)
        now = time.process_time()
        if now - began > seconds:
            subject.fail(
                f"is slow: {now - before:.1f} s for {len(text):,} characters of {what} ({shown(text, 24)})",
                f"{sum(map(len, texts.values())):,} characters must take less than {seconds:g} s of CPU time",
            )
