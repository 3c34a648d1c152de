"""check_metric: named finite figures, the same every time, for anything a model may generate. No torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from sentcompress.contracts import Metric, Reconstruction
from sentcompress.testing.checks import Subject, shown


def _pair(reference: str, hypothesis: str) -> Reconstruction:
    """A pair whose tokens are code points."""
    return Reconstruction(reference, hypothesis, tuple(map(ord, reference)), tuple(map(ord, hypothesis)))


_PAIRS = {
    "an exact reconstruction": _pair("The nation met here.", "The nation met here."),
    "an empty reconstruction": _pair("It is the law.", ""),
    "a wrong reconstruction": _pair("It is the law.", "Peace and order, with care"),
    "a reconstruction of one character": _pair(".", "a"),
    "a reconstruction longer than the sentence": _pair("Yes.", "yes yes " * 50),
    "white space": _pair(" \n", "\t"),
    "text in other scripts": _pair(
        "这是。 हिन्दी \U0001f468\u200d\U0001f469 e\u0301", "这\ufffd हि \U0001f468 \u00e9"
    ),
    "tokens without text": Reconstruction("a", "", (5,), (2000, 2001)),
}


def check_metric(cls: type[Metric], options: Any | None = None) -> None:
    """Check that a metric fulfils its contract.

    ``compute`` must return a dict of at least one name to a finite float, give the same figures for the same input
    (also from a new instance), leave its input unchanged, and handle one pair or many: exact, empty, wrong, long.

    Args:
        options: raw options or an ``Options`` instance.

    Raises:
        CheckFailed: says in one sentence what is wrong.
    """
    __tracebackhide__ = True
    subject = Subject("metric", cls, options)
    metric: Metric = subject.build()
    cases = {f"one pair, {what}": [pair] for what, pair in _PAIRS.items()}
    cases["all exact reconstructions"] = [_pair(text, text) for text in ("One.", "Two, three.", "四。")]
    cases["empty reconstructions only"] = [_pair(text, "") for text in ("One.", "Two, three.")]
    cases["pairs of every kind"] = list(_PAIRS.values()) * 3
    for what, pairs in cases.items():
        first = _compute(subject, metric, pairs, what)
        for again, which in ((metric, "the second time"), (subject.build(), "from a new instance")):
            figures = _compute(subject, again, pairs, what)
            if figures != first:
                subject.fail(
                    f"returns different figures {which} for {what}: first {shown(first)}, then {shown(figures)}",
                    "equal reconstructions must give equal figures",
                )


def _compute(
    subject: Subject, metric: Metric, pairs: Sequence[Reconstruction], what: str
) -> dict[str, float]:
    given = copy.copy(pairs)
    figures = subject.call(f"compute() for {what}", lambda: metric.compute(given))
    if given != pairs:
        subject.fail(f"changes its input ({what})", "it must work on a copy")
    promise = "it must return a dict of names to finite floats"
    if not isinstance(figures, dict):
        subject.fail(f"returns {shown(figures)} for {what}", promise)
    if not figures:
        subject.fail(f"returns no figure for {what}", promise)
    for name, value in figures.items():
        if not isinstance(name, str) or not name.strip():
            subject.fail(f"returns a figure under the name {name!r} for {what}", "names must not be empty")
        # No bool, NumPy float32 or tensor: JSON cannot hold them.
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            subject.fail(f"returns {name}={shown(value)} for {what}", promise)
    return figures
