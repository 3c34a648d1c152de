"""What the cache of one block holds: slots of kept and recalled tokens, the index, and slow storage behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from sentcompress.errors import InputError
from sentcompress.sentence_memory.attention import expect_queries
from sentcompress.sentence_memory.positions import Rotation
from sentcompress.sentence_memory.slow_storage import SCALE_BYTES, SlowStorage, pack, unpack
from sentcompress.sentence_memory.token_table import TokenTable


class BlockSlots(CacheLayerMixin):
    """Where one block of the LLM keeps what it attends to.

    ``keys`` and ``values`` are ``[B, kv heads, R + N, D]``: R slots of kept tokens, the same for all heads, and N slots
    of recalled tokens, which each head fills by itself and keeps until it needs the room. They may be packed in 8 bits
    (:func:`~sentcompress.sentence_memory.slow_storage.pack`), here and in slow storage.

    Args:
        table: plans each call. Blocks know the table and not their memory, so that it is freed with its last reference.
        storage: makes the slow storage of one row.
        packs: keep keys and values in 8 bits.
        recalls: this block recalls, if the memory does.
        rotation: how keys turn when positions are re-indexed.
    """

    def __init__(
        self,
        table: TokenTable,
        storage: Callable[[], SlowStorage],
        rotation: Rotation | None = None,
        *,
        packs: bool = False,
        recalls: bool = True,
    ) -> None:
        super().__init__()
        self.keys: Any = None
        self.values: Any = None
        self._rotation, self._packs = rotation or Rotation(None), packs
        self._table, self._make_storage = table, storage
        self._policy = table.policy if recalls else table.policy.without_recall
        self.storage: list[SlowStorage] = []
        """Of each row, with a policy that recalls."""
        self.index: Any = None
        """Of the stored tokens, ``[B, kv heads, capacity, C]``."""
        self.held: Any = None
        """Number of the stored token in each of the N slots, ``[B, kv heads, N]``; -1 in a free one."""

    # ---- what transformers asks for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        self.dtype = key_states.dtype
        if self.keys is not None:  # a prefix, which was loaded before anyone knew where this block lies
            self._move(key_states.device)
            return
        self.keys, self.values = self._packed(key_states[:, :, :0]), self._packed(value_states[:, :, :0])
        self.held = torch.full((batch, heads, 0), -1, device=key_states.device)
        if self._policy.recall:
            self.storage = [self._make_storage() for _ in range(batch)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Announce the attention of this block; the new tokens are taken then, since recalling needs the queries."""
        self._table.planned()  # refuses an LLM that has not announced its tokens
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.dtype != self.dtype:
            raise InputError(
                f"the LLM computes in {key_states.dtype} now, but its memory holds {self.dtype}",
                fix="call memory.reset() when the LLM has changed",
            )
        expect_queries(self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        raise NotImplementedError("the cache knows it")

    get_max_length = get_seq_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def reset(self) -> None:
        self.keys = self.values = self.index = self.held = None
        self.storage = []
        self.is_initialized = False

    @property
    def _kept_slots(self) -> int:
        return int(self.keys.shape[2] - self.held.shape[2])

    def _packed(self, full: Tensor) -> Tensor:
        return pack(full) if self._packs else full

    def _full(self, packed: Tensor) -> Tensor:
        return unpack(packed, self.dtype) if self._packs else packed

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value in the LLM's own cache; 0 before the first token."""
        if self.keys is None:
            return 0
        sizes = (t.shape[3] - (SCALE_BYTES if self._packs else 0) for t in (self.keys, self.values))
        return int(self.keys.shape[1] * sum(sizes) * self.dtype.itemsize)

    def text_bytes(self, row: int, kept: int) -> tuple[int, int]:
        """Bytes of one text on the device and in slow storage, without room to grow.

        Args:
            kept: tokens in its slots.
        """
        if self.keys is None:
            return 0, 0
        per_head = sum(tensor.shape[3] * tensor.dtype.itemsize for tensor in (self.keys, self.values))
        held = int((self.held[row] >= 0).sum())
        device = per_head * (kept * self.keys.shape[1] + held) + held * self.held.dtype.itemsize
        if not (self.storage and (length := self.storage[row].length)):
            return device, 0
        index = self.index[0, :, 0].nbytes
        return device + length * index, self.storage[row].nbytes

    def recalled(self, attended: Tensor) -> Tensor:
        """Places in slow storage of what the last token recalled: ``[B, kv heads, N]``, -1 in slots it did not use.

        Args:
            attended: that of the plan.
        """
        seen = attended[:, :, self._kept_slots :]
        return self.held[:, :, : seen.shape[2]].masked_fill(~seen, -1)

    # ---- a prefix

    def state(self) -> dict[str, Tensor]:
        """Everything of a batch of one but what was recalled, which later tokens recall again."""
        state = {name: getattr(self, name)[:, :, : self._kept_slots] for name in ("keys", "values")}
        if self.storage and (length := self.storage[0].length):
            state |= {"index": self.index[:, :, :length], "stored.0": self.storage[0].stored()[:, None]}
        return state

    def load_state(self, state: dict[str, Tensor], rows: int, dtype: torch.dtype) -> None:
        """Begin each of ``rows`` rows with what :meth:`state` returned; stored tokens stay where they are."""
        self.dtype = dtype
        self.keys, self.values, self.index = (
            None if (tensor := state.get(name)) is None else tensor.expand(rows, -1, -1, -1).clone()
            for name in ("keys", "values", "index")
        )
        self.held = torch.full((*self.keys.shape[:2], 0), -1, device=self.keys.device)
        if self._policy.recall:
            self.storage = [self._make_storage() for _ in range(rows)]
            if (stored := state.get("stored.0")) is not None:
                for storage in self.storage:
                    storage.share(stored[:, 0], self.keys[0])

    # ---- a batch whose texts come and go

    def select(self, rows: Tensor) -> None:
        """Only keep some rows, int64 ``[n]``, as the table does already."""
        if not len(rows):
            self.reset()
        if self.keys is None:
            return
        self.storage = [self.storage[row] for row in rows.tolist() if self.storage]
        rows = rows.to(self.keys.device)
        self.keys, self.values, self.held = self.keys[rows], self.values[rows], self.held[rows]
        if self.index is not None:
            length = max(storage.length for storage in self.storage)
            self.index = self.index[rows, :, :length] if length else None
        used = (self.held >= 0).any(1).any(0).nonzero()
        self._resize(self._table.capacity, int(used.max()) + 1 if len(used) else 0)

    def join(self, other: BlockSlots) -> None:
        """Add the rows of another cache of this block, which is not used any more."""
        if self.keys is None or other.keys is None:
            parts = self if other.keys is None else other
            for name in ("keys", "values", "index", "held", "storage", "dtype", "is_initialized"):
                setattr(self, name, getattr(parts, name, None))
            return
        other._move(self.keys.device)
        kept, recalled = (
            max(pair)
            for pair in zip(*((each._kept_slots, each.held.shape[2]) for each in (self, other)), strict=True)
        )
        room = max(0 if each.index is None else each.index.shape[2] for each in (self, other))
        if room:
            like = other.index if self.index is None else self.index
            self.index = torch.cat([each._index_with(room, like) for each in (self, other)])
        for each in (self, other):
            each._resize(kept, recalled)
        for name in ("keys", "values", "held"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.storage = self.storage + other.storage

    def _index_with(self, room: int, like: Tensor) -> Tensor:
        """The index with room for so many tokens."""
        if self.index is None:
            return like.new_zeros(len(self.keys), like.shape[1], room, like.shape[3])
        return functional.pad(self.index, (0, 0, 0, room - self.index.shape[2]))

    def _resize(self, kept: int, recalled: int) -> None:
        """Have so many slots for kept and for recalled tokens; those at the end are added or go."""
        if kept == self._kept_slots and recalled == self.held.shape[2]:
            return

        def grown(tensor: Tensor) -> Tensor:
            old = self._kept_slots
            parts = functional.pad(tensor[:, :, :old], (0, 0, 0, kept - old)), tensor[:, :, old:]
            return torch.cat([parts[0], functional.pad(parts[1], (0, 0, 0, recalled - parts[1].shape[2]))], 2)

        self.keys, self.values = grown(self.keys), grown(self.values)
        self.held = functional.pad(self.held, (0, recalled - self.held.shape[2]), value=-1)

    def _move(self, device: torch.device) -> None:
        for name in ("keys", "values", "index", "held"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        for storage in self.storage:
            storage.to(device)
        self.is_initialized = True
