"""check_segmenter: lossless, deterministic, quick, and its state survives JSON."""

from __future__ import annotations

import json
import time
from typing import Any

from sentcompress.contracts import Segmenter
from sentcompress.errors import PluginError
from sentcompress.testing.failures import CheckFailed, Subject, place_of, shown
from sentcompress.testing.texts import NASTY, generated, hostile, ordinary, tiny_tokenizer
from sentcompress.text.segmentation import checked_split

_DOCUMENTS = 20
"""Documents it may learn from."""


def check_segmenter(
    segmenter: Segmenter | type[Segmenter],
    options: Any | None = None,
    *,
    tokenizer: Any | None = None,
    characters: int = 1_000_000,
    seconds: float = 20.0,
) -> None:
    """Prove that a segmenter keeps its contract's promises.

    It is prepared as for a corpus. Then ``split`` must return a list of non-empty strings that joined are the
    text, for nasty and generated texts, twice the same, and the same from a new instance that was given its
    ``state()`` as JSON; and be through with a long text of each sort, ordinary and hostile, in time.

    Args:
        segmenter: the class, or an instance.
        options: for a class: raw options or an ``Options``.
        tokenizer: what it is prepared with; a tiny byte-level one by default.
        characters: length of the ordinary text, and of the hostile stretches together.
        seconds: CPU time allowed for each of these two.

    Raises:
        CheckFailed: in one sentence.
    """
    __tracebackhide__ = True
    subject = Subject("segmenter", segmenter, options)
    mine: Segmenter = subject.build() if isinstance(segmenter, type) else segmenter
    tokenizer = tokenizer or tiny_tokenizer()
    known = bool(subject.call("state()", mine.state))
    documents = None if known else (ordinary(2000, seed) for seed in range(_DOCUMENTS))
    subject.call("prepare(tokenizer, documents)", lambda: mine.prepare(tokenizer, documents))
    if not isinstance(mine.max_tokens, int) or mine.max_tokens < 2:
        subject.fail(f"has max_tokens {mine.max_tokens!r}", "it must be an integer of at least 2")

    # The limit is on the wall clock, and the machine may be busy; what counts for speed is CPU time.
    limit = 3 * seconds
    texts = [*NASTY, *generated()]
    cuts = [_split(mine, text, limit) for text in texts]
    for text, pieces in zip(texts, cuts, strict=True):
        _same(
            subject, text, pieces, _split(mine, text, limit), "cuts the same text differently the second time"
        )
    twin = _from_json(subject, mine, tokenizer)
    for text, pieces in zip(texts, cuts, strict=True):
        what = "cuts differently after load_state(state()) on a new instance"
        _same(subject, text, pieces, _split(twin, text, limit), what)

    _in_time(subject, mine, {"ordinary text": ordinary(characters)}, seconds)
    _in_time(subject, mine, hostile(characters), seconds)


def _split(segmenter: Segmenter, text: str, limit: float) -> list[str]:
    """The guard of every real run does the work, and words it."""
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
    expected = "it must be a dict of JSON values (str keys; lists, not tuples or sets)"
    if not isinstance(state, dict):
        subject.fail(f"returns {shown(state)} from state()", expected)
    try:
        copy = json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        subject.fail(f"has a state() that JSON cannot hold ({error})", expected)
    for key, value in state.items():
        if copy.get(key) != value:
            subject.fail(f"has {key!r}: {shown(value)} in state(), which JSON changes", expected)
    twin: Segmenter = subject.build()
    subject.call("load_state(state)", lambda: twin.load_state(copy))
    subject.call("prepare(tokenizer, None)", lambda: twin.prepare(tokenizer, None))
    again = subject.call("state()", twin.state)
    if again != state:
        subject.fail(
            f"has another state() after load_state: {shown(again)} instead of {shown(state)}",
            "load_state must take back all that state() returned",
        )
    return twin


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
