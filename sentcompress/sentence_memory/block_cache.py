"""The cache of one block: kept tokens, recalled tokens, the index, and slow storage behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import CacheLayerMixin

from sentcompress.errors import InputError
from sentcompress.sentence_memory.attention import expect_queries, without_gradient
from sentcompress.sentence_memory.call_plan import Moves, Plan, Reading, Stored
from sentcompress.sentence_memory.positions import Rotation
from sentcompress.sentence_memory.slow_storage import SCALE_BYTES, SlowStorage, pack, unpack
from sentcompress.sentence_memory.token_table import SLOTS, TokenTable
from sentcompress.sentence_memory.visibility import attend, attend_in_one_pass, best_of_each, chosen


class BlockCache(CacheLayerMixin):
    """What one block of the LLM attends to.

    ``keys`` and ``values`` are ``[B, kv heads, R + N, D]``: R slots of kept tokens, the same for all heads, and N slots
    of recalled tokens, which each head fills by itself and keeps until it needs the room. They may be packed in 8 bits
    (:func:`~sentcompress.sentence_memory.slow_storage.pack`), here and in slow storage.

    Args:
        table: plans each call. Blocks know the table and not their memory, so that it is freed with its last reference.
        storage: makes the slow storage for a number of rows.
        packs: keep keys and values in 8 bits.
        recalls: this block recalls, if the memory does.
        rotation: how keys turn when positions are re-indexed.
    """

    def __init__(
        self,
        table: TokenTable,
        storage: Callable[[int], SlowStorage],
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
        self.storage: Any = None
        """:class:`SlowStorage` of a policy that recalls."""
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
            self.storage = self._make_storage(batch)
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
        if self.storage is not None:
            self.storage.reset()
        self.keys = self.values = self.index = self.held = self.storage = None
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
        if self.storage is not None and self.storage.length(0):
            state["index"] = self.index[:, :, : self.storage.length(0)]
            state.update({f"stored.{number}": part for number, part in enumerate(self.storage.stored())})
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
            self.storage = self._make_storage(rows)
            if stored := [state[name] for name in sorted(state) if name.startswith("stored.")]:
                self.storage.share(stored, self.keys[0])

    def _move(self, device: torch.device) -> None:
        for name in ("keys", "values", "index", "held"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(device))
        if self.storage is not None:
            self.storage.to(device)
        self.is_initialized = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Take new tokens and attend. No gradient flows back; who asks for it gets an InputError.

        Args:
            query: ``[B, heads, Q, D]``.
            key, value: of the same tokens, ``[B, kv heads, Q, D]``.

        Returns:
            ``[B, heads, Q, D]``.
        """
        plan = self._table.planned().on(query.device)
        call = self._attend_many if plan.reading is not None else self._attend_one
        with torch.no_grad():
            out = call(query, key, value, plan, **options)
        return without_gradient(query, out)

    # ---- one new token in each row

    def _attend_one(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        sliding_window: int | None = None,
        **options: Any,
    ) -> Tensor:
        if plan.moves is not None and plan.moves.slots is not None:
            kept = slice(0, self._kept_slots)
            moved = self._rotation.rotate(self._full(self.keys[:, :, kept]), plan.moves.slots)
            self.keys[:, :, kept] = self._packed(moved)
            self.held[plan.moves.rows] = -1
        for row, slots in self._leaving(plan):
            self._store(row, self.keys[row].index_select(1, slots), self.values[row].index_select(1, slots))
        self._index_moved(plan)
        self._grow(plan.slots.shape[1], self.held.shape[2])
        key, value = self._packed(key), self._packed(value)
        self.keys[plan.own_slots], self.values[plan.own_slots] = key[:, :, 0], value[:, :, 0]
        batch, heads, groups = *query.shape[:2], key.shape[1]
        rows = query.view(batch, groups, heads // groups, 1, -1)
        mask = plan.seen
        if sliding_window is not None:
            mask = mask & (plan.position - plan.slots < sliding_window)[:, None]
        if plan.stored is not None and self.storage is not None:
            out_of_reach = plan.stored.out_of_reach
            if sliding_window is not None:
                far = plan.position - plan.stored.position >= sliding_window
                out_of_reach = out_of_reach.masked_fill(far, -math.inf)
            recalled = self._recall(rows[:, :, :, 0], plan.stored, out_of_reach)
            mask = torch.cat([mask.expand(-1, groups, -1), recalled], 2)
        plan.attended.append(mask)
        out = attend(
            rows,
            self._full(self.keys[:, :, : mask.shape[2]]),
            self._full(self.values[:, :, : mask.shape[2]]),
            mask[:, :, None],
            **options,
        )
        return out.reshape(batch, heads, 1, -1)

    def _recall(self, query: Tensor, stored: Stored, out_of_reach: Tensor) -> Tensor:
        """Bring what the new token recalls into the cache.

        Args:
            query: ``[B, kv heads, G, D]``.
            out_of_reach: ``[B, n]``, added to scores: minus infinity for a token that cannot be recalled, else 0.

        Returns:
            which of the N slots it attends to: bool ``[B, kv heads, N]``.
        """
        length = out_of_reach.shape[1]
        sentence = stored.sentence[:, None].expand(-1, query.shape[1], -1)
        # With the room to grow, so that products need no copy of the index.
        scores = self._policy.scores(query, self.index)[..., :length].amax(2).float() + out_of_reach[:, None]

        def best(scores: Tensor, number: int) -> Tensor:
            each = best_of_each(scores[:, :, None], stored.sentence, stored.sentences)[:, :, 0]
            return chosen(each, number).gather(2, sentence) & (scores > -math.inf)

        if self._policy.candidates > self._policy.recall:
            rows, heads, tokens = best(scores, self._policy.candidates).nonzero(as_tuple=True)
            keys = self._full(self._gather(rows, heads, tokens, stored.delta)[0])
            if keys.is_cpu:
                # One product per row, with the queries of all heads, is faster, though most of it is not used.
                own = torch.bincount(rows, minlength=len(query)).tolist()
                pairs = zip(keys.split(own), query.flatten(1, 2), strict=True)
                of_all = torch.cat([k @ q.t() for k, q in pairs]).unflatten(1, query.shape[1:3]).amax(2)
                exact = of_all.gather(1, heads[:, None])[:, 0]
            else:
                exact = torch.einsum("ngd,nd->ng", query[rows, heads], keys).amax(1)
            scores = torch.full_like(scores, -math.inf)
            scores[rows, heads, tokens] = exact.float()
        wanted = best(scores, self._policy.recall)
        return self._fetch(wanted, stored.delta)

    def _leaving(self, plan: Plan) -> list[tuple[int, Tensor]]:
        return [] if self.storage is None else plan.leaving

    def _gather(
        self, rows: Tensor, heads: Tensor, tokens: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Stored keys and values ``[n, D]``, where they stand now."""
        keys, values = self.storage.gather(rows, heads, tokens)
        if delta is not None:
            turned = self._rotation.rotate(self._full(keys)[None, None], delta[rows, tokens][None])
            keys = self._packed(turned[0, 0])
        return keys, values

    def _index_moved(self, plan: Plan) -> None:
        """Index stored keys anew in rows whose positions have moved."""
        if plan.moves is None or plan.stored is None or plan.stored.delta is None or self.storage is None:
            return
        for row in plan.moves.rows:
            stop = self.storage.length(row)
            keys = self._full(self.storage.read(0, stop)[0][row : row + 1])
            index = self._policy.index(self._rotation.rotate(keys, plan.stored.delta[row : row + 1, :stop]))
            self.index[row, :, :stop] = index[0]

    def _fetch(self, wanted: Tensor, delta: Tensor | None) -> Tensor:
        """Bring stored tokens into the N slots where they are not there yet.

        Args:
            wanted: bool ``[B, kv heads, n]``.
            delta: how far they have moved since they were stored, ``[B, n]``.

        Returns:
            which slots hold one of them: bool ``[B, kv heads, N]``.
        """
        number = wanted.shape[2]
        load = functional.pad(wanted, (0, 1))  # the last column stands for a free slot
        place = torch.where(self.held < 0, number, self.held)
        serves = load.gather(2, place)
        load.scatter_(2, place, False)
        rows, heads, tokens = load[:, :, :number].nonzero(as_tuple=True)
        if not len(rows):
            return serves
        batch, count, size = serves.shape
        needed = torch.bincount(rows * count + heads, minlength=batch * count).view(batch, count, 1)
        lacking = int((needed + serves.sum(2, keepdim=True)).max()) - size
        if lacking > 0:
            self._grow(self._kept_slots, size + -(-lacking // SLOTS) * SLOTS)
            serves = functional.pad(serves, (0, self.held.shape[2] - size))
        # The i-th token of a head goes into the i-th of its slots that do not serve.
        free = ~serves
        slots = (free & (free.cumsum(2) <= needed)).nonzero(as_tuple=True)[2]
        keys, values = self._gather(rows, heads, tokens, delta)
        self.keys[rows, heads, self._kept_slots + slots] = keys
        self.values[rows, heads, self._kept_slots + slots] = values
        self.held[rows, heads, slots] = tokens
        serves[rows, heads, slots] = True
        return serves

    def _store(self, row: int, keys: Tensor, values: Tensor, index: Tensor | None = None) -> None:
        """Store tokens of a row, ``[kv heads, L, D]``, and index them.

        Args:
            index: of these keys, ``[kv heads, L, C]``; None computes it.
        """
        start = self.storage.length(row)
        self.storage.append(row, keys, values)
        if index is None:
            index = self._policy.index(self._full(keys)[None])[0]
        stop = start + index.shape[1]
        if self.index is None:
            self.index = index.new_zeros(len(self.keys), index.shape[0], 0, index.shape[2])
        if stop > self.index.shape[2]:
            more = max(stop - self.index.shape[2], self.index.shape[2] // 16, SLOTS)
            self.index = functional.pad(self.index, (0, 0, 0, more))
        self.index[row, :, start:stop] = index

    def _grow(self, kept: int, recalled: int) -> None:
        """Make room for so many slots."""
        if kept == self._kept_slots and recalled == self.held.shape[2]:
            return

        def grown(tensor: Tensor) -> Tensor:
            old = self._kept_slots
            parts = functional.pad(tensor[:, :, :old], (0, 0, 0, kept - old)), tensor[:, :, old:]
            return torch.cat([parts[0], functional.pad(parts[1], (0, 0, 0, recalled - parts[1].shape[2]))], 2)

        self.keys, self.values = grown(self.keys), grown(self.values)
        self.held = functional.pad(self.held, (0, recalled - self.held.shape[2]), value=-1)

    # ---- many new tokens

    def _attend_many(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, **options: Any) -> Tensor:
        reading = plan.reading
        assert reading is not None
        packed_keys = self._with_past(self.keys, self._packed(key), reading)
        packed_values = self._with_past(self.values, self._packed(value), reading)
        before = self._stored_before(reading, plan.moves)
        if before is not None and not self.storage.is_lossy:
            _fill((packed_keys, packed_values), before, reading)
        keys, values = self._full(packed_keys), self._full(packed_values)
        stored = None
        if self.storage is not None and self.storage.is_lossy:
            stored = self.storage.as_stored(keys), self.storage.as_stored(values)
            _fill(stored, before, reading)
        index = self._policy.index(keys) if self._policy.recall else None
        if before is not None and index is not None:
            _fill((index,), (self.index,), reading)
        parts = []
        turned = keys
        for start, stop, turned, own_index, own_stored in self._spans(
            keys, index, stored, plan.moves, reading.past
        ):
            end = reading.past + stop
            out = attend_in_one_pass(
                query[:, :, start:stop],
                turned,
                values[:, :, :end],
                reading.layout.columns(0, end),
                self._policy,
                index=own_index,
                stored=own_stored,
                masks=reading.masks if turned is keys else None,  # a span has a layout of its own
                in_full=self._table.reads_in_full,
                **options,
            )
            parts.append(out)
        if turned is not keys:
            packed_keys, index = self._packed(turned), None  # the index is that of other keys
        leaving = [packed_keys, packed_values, *([] if index is None else [index])]
        for row, columns in self._leaving(plan):
            self._store(row, *(t[row].index_select(1, columns) for t in leaving))
        self._index_moved(plan)
        place = reading.columns[:, None, :, None]
        self.keys, self.values = (
            t.gather(2, place.expand(-1, t.shape[1], -1, t.shape[3])) for t in (packed_keys, packed_values)
        )
        self.held = self.held[:, :, :0]
        return torch.cat(parts, 2)

    def _spans(
        self,
        keys: Tensor,
        index: Tensor | None,
        stored: tuple[Tensor, Tensor] | None,
        moves: Moves | None,
        past: int,
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]]:
        """New tokens between which positions do not move, with keys, index and stored pair as those tokens see them."""
        spans = moves.spans if moves is not None else []
        if not spans:
            yield 0, keys.shape[2] - past, keys, index, stored
        for start, stop, delta in spans:
            end = past + stop
            turned = self._rotation.rotate(keys[:, :, :end], delta)
            own = None
            if stored is not None:
                own = self._rotation.rotate(stored[0][:, :, :end], delta), stored[1][:, :, :end]
            yield (
                start,
                stop,
                turned,
                self._policy.index((own or (turned,))[0]) if self._policy.recall else None,
                own,
            )

    def _with_past(self, cached: Tensor, new: Tensor, reading: Reading) -> Tensor:
        """Keys or values of all tokens of the layout; zeros for those that are not in the cache."""
        if not reading.past:
            return new
        past = new.new_zeros(*new.shape[:2], reading.past, new.shape[3])
        for row, (slots, tokens) in enumerate(reading.before):
            past[row, :, tokens] = cached[row, :, slots]
        return torch.cat([past, new], 2)

    def _stored_before(self, reading: Reading, moves: Moves | None) -> tuple[Tensor, Tensor] | None:
        """What was stored in earlier calls, ``[B, kv heads, n, D]`` twice; None if nothing was."""
        if self.storage is None or not any(map(len, reading.stored_before)):
            return None
        keys, values = self.storage.read()
        if moves is not None and moves.stored:
            delta = pad_sequence(moves.stored, batch_first=True)
            keys = self._packed(self._rotation.rotate(self._full(keys), delta))
        return keys, values


def _fill(full: tuple[Tensor, ...], stored: tuple[Tensor, ...] | None, reading: Reading) -> None:
    """Write what was stored in earlier calls to its tokens' columns in the layout."""
    for tensor, part in zip(full, stored or (), strict=False):
        for row, tokens in enumerate(reading.stored_before):
            tensor[row, :, tokens] = part[row, :, : len(tokens)]
