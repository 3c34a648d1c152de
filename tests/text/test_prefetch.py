"""Batches made ahead: order, exceptions, an end that waits for nothing."""

from __future__ import annotations

import threading
import time

import pytest

from sentcompress.text.prefetch import prefetch


def test_order_and_depth() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return index * index

    with prefetch(make, 3, depth=2) as batches:
        assert [next(batches) for _ in range(4)] == [9, 16, 25, 36]
        time.sleep(0.2)
        assert made == list(range(3, 3 + len(made)))
        assert len(made) <= 4 + 2 + 1  # taken, queued, and one waiting for room


def test_an_exception_reaches_the_consumer_after_the_good_batches() -> None:
    def make(index: int) -> int:
        if index == 2:
            raise KeyError("batch 2")
        return index

    with prefetch(make, 0) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        for _ in range(2):
            with pytest.raises(KeyError, match="batch 2"):
                next(batches)


def test_close_ends_the_thread_while_it_waits_for_room() -> None:
    before = threading.active_count()
    batches = prefetch(lambda index: index, 0, depth=1)
    assert next(batches) == 0
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


def test_waiting_is_measured() -> None:
    with prefetch(lambda _: time.sleep(0.05), 0) as batches:
        next(batches)
        assert batches.wait_seconds > 0.02


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth"):
        prefetch(lambda index: index, 0, depth=0)
