"""Writing that training does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

Write = Callable[[], object]


class BackgroundWriter:
    """Does one piece of writing at a time in a thread of its own.

    Args:
        enabled: False does it at once.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Write) -> None:
        """Begin to write, after what was begun before. Raises what that raised, as :meth:`wait` does."""
        self.wait()
        if not self.enabled:
            write()
            return

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = Thread(target=run, name="saving")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last writing raised, if it has ended; wait for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; raise what the last writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Let what is being written come to its end, whatever becomes of it: something else has gone wrong."""
        if self._thread is not None:
            self._thread.join()
