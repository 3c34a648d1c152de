"""A time limit for the code of plugins. No torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from sentcompress.errors import InputError

VARIABLE = "SENTCOMPRESS_SPLIT_SECONDS"
SECONDS = 60.0
CHARACTERS_PER_SECOND = 1000
"""Slower than any known segmenter; a neural one on a CPU reads a few thousand."""


class Overtime(BaseException):
    """The time limit has passed. Not an ``Exception``, so that a plugin's ``except Exception`` does not catch it."""


def split_seconds(characters: int) -> float:
    """Seconds that a segmenter may take for a text; 0 means no limit.

    60, or ``$SENTCOMPRESS_SPLIT_SECONDS`` (0: no limit), plus one for every 1,000 characters.

    Raises:
        InputError: the variable is not a number.
    """
    value = os.environ.get(VARIABLE, "").strip()
    try:
        base = float(value) if value else SECONDS
    except ValueError:
        base = -1.0
    if not 0 <= base < 1e9:
        raise InputError(
            f"{VARIABLE}={value}: must be a number of seconds",
            fix="set it to a number such as 60, or 0 for no limit",
        )
    return base + characters / CHARACTERS_PER_SECOND if base else 0.0


class TimeLimit:
    """``with TimeLimit(seconds):`` raises :class:`Overtime` in the block when this much wall-clock time has passed.

    An alarm signal interrupts the block, which ends loops in Python, waiting, and backtracking in ``re`` and
    ``regex``. It cannot end C code that does not check for signals, or a loop that catches every exception. There is
    no limit outside the main thread, on Windows, or if the caller has set an earlier alarm; a later alarm of the
    caller still rings on time. Worker processes split text in their main thread.

    Args:
        seconds: 0 for no limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._on = False
        self._armed = False

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._on:
            raise Overtime

    def __enter__(self) -> TimeLimit:
        if self.seconds <= 0 or not hasattr(signal, "setitimer"):
            return self
        if threading.current_thread() is not threading.main_thread():
            return self
        due, _ = signal.getitimer(signal.ITIMER_REAL)
        if 0 < due <= self.seconds:
            return self
        self._handler: Any = signal.signal(signal.SIGALRM, self._ring)
        self._armed = self._on = True
        self._began = time.monotonic()
        # It rings again every second, since a bare `except:` in a plugin catches a ring.
        self._due, self._interval = signal.setitimer(signal.ITIMER_REAL, self.seconds, 1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on = False
        if not self._armed:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if self._handler is None else self._handler)
        if self._due:
            left = self._due - (time.monotonic() - self._began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), self._interval)
