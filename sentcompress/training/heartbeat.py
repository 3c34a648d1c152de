"""Signs of life: ``heartbeat.json`` in a stage's folder, for ``sentcompress watch`` and for schedulers. No torch."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sentcompress.errors import StorageError, TerminatedError
from sentcompress.files import write_atomically

FILE = "heartbeat.json"
SECONDS = 5.0
"""Between signs while nothing changes."""
LARGEST = 1 << 20
"""Characters of the file; one that is longer is not ours."""
LONGEST_AGE = 100 * 365 * 86400.0
"""Seconds between two clocks, however wrong one is: more is no time, and the file is broken."""


class Heartbeat:
    """Writes what a stage is doing; leaves the reason behind when it fails, and nothing when it is done.

    A file that cannot be written is no reason to stop training: the next checkpoint will say so better.

    Args:
        folder: of the stage.
        steps: of the whole run.
        shown: False (all processes but the first) writes nothing.
    """

    def __init__(self, folder: Path, steps: int, *, shown: bool = True) -> None:
        self.path = folder / FILE
        self.shown = shown
        self.facts: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "steps": steps,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._written = float("-inf")
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # A daemon: it must not keep a process alive that wants to end.
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def beat(self, state: str, step: int, figures: Mapping[str, float] | None = None) -> None:
        """Say what is done now; written when it changed, or some seconds after the last time.

        Args:
            state: ``training``, ``evaluating`` or ``saving``.
            step: steps done.
            figures: of ``metrics.jsonl``.
        """
        changed = state != self.facts["state"]
        kept = ("loss", "tokens_per_second")
        self.facts = {
            **self.facts,
            "state": state,
            "step": step,
            **{name: figures[name] for name in kept if figures and name in figures},
        }
        if changed or time.monotonic() - self._written >= SECONDS:
            self._write()

    def _go_on(self) -> None:
        """A sign every few seconds, also in a long step, evaluation or save."""
        while not self._ended.wait(max(SECONDS, 0.1)):
            self._write()

    def _write(self) -> None:
        if not self.shown:
            return
        self._written = time.monotonic()
        with self._lock, suppress(StorageError):
            text = json.dumps(self.facts | {"time": time.time()}) + "\n"
            write_atomically(self.path, text, durable=False)

    def __enter__(self) -> Heartbeat:
        if self.shown:
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.shown:
            return
        self._ended.set()
        self._thread.join()
        if error is None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return
        stopped = isinstance(error, KeyboardInterrupt | TerminatedError)
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self.facts |= {"state": "stopped" if stopped else "failed", "error": "" if stopped else reason}
        self._write()


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last sign of a stage that is not done, with the seconds since as ``age``; None where there is none.

    The age is this machine's clock less the run's.
    """
    path = folder / FILE
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with open(path, encoding="utf-8") as file:
            facts = json.loads(file.read(LARGEST))
        age = time.time() - float(facts["time"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # Another machine's clock may be ahead.
    return {**facts, "age": max(0.0, age)} if abs(age) <= LONGEST_AGE else None
