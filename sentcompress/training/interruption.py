"""Ctrl-C and SIGTERM: the first one lets the step finish and saves; a Ctrl-C after it ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Within the block, the first SIGINT or SIGTERM only sets ``asked``; a Ctrl-C after it acts as usual.

    A SIGTERM after it changes nothing: launchers pass on what a cluster has sent to everyone already.

    Outside the main thread, where Python has no signal handlers, it never asks.

    Attributes:
        asked: the signal, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._before.pop(signal.SIGINT))
        self.asked = self.asked or number
