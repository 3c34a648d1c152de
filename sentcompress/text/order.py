"""Random orders: listed in memory, or computed place by place. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ROUNDS = 4
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Shuffle:
    """A permutation of ``0 .. count - 1`` by its seed, computed place by place (a Feistel network).

    Args:
        count: at least 1.
        seed: integers.
    """

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self.count = count
        self.half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.default_rng(seed).integers(1 << 63, size=ROUNDS, dtype=np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places, ``[n]`` int64; each number stands at one place."""
        values = self._mixed(places.astype(np.uint64))
        # The network permutes a square number of values: one that is too large leads on to another, and so back.
        while (outside := values >= self.count).any():
            values[outside] = self._mixed(values[outside])
        return values.astype(np.int64)

    def _mixed(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            hashed = (right + key) * _MULTIPLIER
            hashed ^= hashed >> np.uint64(29)
            hashed *= _MULTIPLIER
            left, right = right, left ^ ((hashed >> np.uint64(32)) & self.mask)
        return (left << self.half) | right


class Epochs:
    """The orders of recent epochs, each a function of the seed and its number."""

    def __init__(self, seed: int, make_order: Callable[[np.random.Generator], np.ndarray]) -> None:
        self.seed = seed
        self.make_order = make_order
        self._recent: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        order = self._recent.get(epoch)
        if order is None:
            order = self.make_order(np.random.default_rng([self.seed, epoch]))
            # Replaced whole, never changed: a prefetching thread may be reading it.
            self._recent = {**dict(list(self._recent.items())[-1:]), epoch: order}
        return order
