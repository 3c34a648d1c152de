"""Makes batches ahead of time in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

Batch = Any


class Prefetcher(Iterator[Batch]):
    """Iterates over ``make_batch(start)``, ``make_batch(start + 1)``, ... and passes exceptions on to the consumer.

    Use as a context manager, or call :meth:`close`.

    Attributes:
        wait_seconds: how long the consumer has waited for batches so far.
    """

    def __init__(self, make_batch: Callable[[int], Batch], start: int, depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.wait_seconds = 0.0
        self._make_batch = make_batch
        self._queue: queue.Queue[tuple[Batch, BaseException | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        # A daemon, so that a prefetcher that was not closed does not keep the process alive.
        self._thread = threading.Thread(target=self._fill, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def _fill(self, index: int) -> None:
        while not self._closed.is_set():
            try:
                item: tuple[Batch, BaseException | None] = (self._make_batch(index), None)
            except BaseException as error:
                item = (None, error)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                return
            index += 1

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        if self._failure is not None:
            raise self._failure
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        batch, self._failure = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if self._failure is not None:
            raise self._failure
        return batch

    def close(self) -> None:
        """Stop the thread and wait for it to end."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prefetch(make_batch: Callable[[int], Batch], start: int, depth: int = 4) -> Prefetcher:
    """Make batches ``start``, ``start + 1``, ... at most ``depth`` ahead of the consumer."""
    return Prefetcher(make_batch, start, depth)
