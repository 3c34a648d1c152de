"""Items in lists of about the same size. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_batches(
    items: Iterable[T], size: Callable[[T], int], enough: int, most: int | None = None
) -> Iterator[list[T]]:
    """Consecutive items, each list as long as it takes to be ``enough`` together; none has over ``most`` of them."""
    batch: list[T] = []
    together = 0
    for item in items:
        batch.append(item)
        together += size(item)
        if together >= enough or len(batch) == most:
            yield batch
            batch, together = [], 0
    if batch:
        yield batch
