"""Ends code of strangers that never returns. No torch."""

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
"""No segmenter in use is slower; a neural one on a CPU reads a few thousand."""


class Overtime(BaseException):
    """The time is over. Not an ``Exception``: a plugin's ``except Exception`` must not swallow it."""


def split_seconds(characters: int) -> float:
    """Seconds a segmenter may take for a text; 0: as long as it wants.

    60, or ``$SENTCOMPRESS_SPLIT_SECONDS`` (0: no limit), and one more for every 1,000 characters.

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
            f"{VARIABLE}={value}: seconds are needed", fix="set it to a number such as 60, 0 for no limit"
        )
    return base + characters / CHARACTERS_PER_SECOND if base else 0.0


class TimeLimit:
    """``with TimeLimit(seconds):`` raises :class:`Overtime` in the block when the wall clock time is over.

    An alarm signal interrupts the block, so it ends loops in Python, waiting, and backtracking in ``re`` and
    ``regex``. What it cannot end: code in C that does not look at signals, and a loop that catches everything.
    There is no limit outside a process' main thread, on Windows, and while an alarm of the caller's own is due
    earlier; a later one of the caller's still comes in time. Worker processes split in their main thread.

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
        # It rings again every second: a bare `except:` in a plugin swallows one ring only.
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
