"""A progress bar on a terminal, or lines of text elsewhere; nothing if the work takes under two seconds."""

from __future__ import annotations

import os
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 2.0
LINE_SECONDS = 5.0


def speaker(enabled: bool) -> Console:
    """A console for messages on stderr; in a distributed run only the first process prints."""
    first = os.environ.get("RANK", "0") == "0"
    return Console(stderr=True, quiet=not (enabled and first), highlight=False, soft_wrap=True)


class Bar:
    """Shows progress on stderr. Use as a context manager."""

    def __init__(self, label: str, total: float, *, enabled: bool = True) -> None:
        self.label, self.total, self.enabled = label, max(total, 1), enabled
        self.done = 0.0
        self.console = Console(stderr=True)
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def advance(self, amount: float) -> None:
        self.done += amount
        now = time.monotonic()
        if not self.enabled or now - self._began < QUIET_SECONDS:
            return
        if self.console.is_terminal:
            self._show_bar()
        elif now - self._shown >= (LINE_SECONDS if self._shown > self._began else QUIET_SECONDS):
            self._shown = now
            share = min(self.done / self.total, 1.0)
            self.console.print(f"{self.label}: {share:.0%} after {now - self._began:.0f} s", highlight=False)

    def _show_bar(self) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        self._bar.update(self._task, completed=self.done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
