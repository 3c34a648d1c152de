"""The cache of one block: what new tokens attend to, what leaves for slow storage, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sentcompress.sentence_memory.attention import without_gradient
from sentcompress.sentence_memory.block_slots import BlockSlots
from sentcompress.sentence_memory.call_plan import Moves, Plan, Reading, Stored
from sentcompress.sentence_memory.slow_storage import gather
from sentcompress.sentence_memory.token_table import SLOTS
from sentcompress.sentence_memory.visibility import attend, attend_in_one_pass, best_of_each, chosen


class BlockCache(BlockSlots):
    """What one block of the LLM attends to: takes new tokens, stores old ones, and recalls."""

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
        self._resize(plan.slots.shape[1], self.held.shape[2])
        key, value = self._packed(key), self._packed(value)
        self.keys[plan.own_slots], self.values[plan.own_slots] = key[:, :, 0], value[:, :, 0]
        batch, heads, groups = *query.shape[:2], key.shape[1]
        rows = query.view(batch, groups, heads // groups, 1, -1)
        mask = plan.seen
        if sliding_window is not None:
            mask = mask & (plan.position - plan.slots < sliding_window)[:, None]
        if plan.stored is not None and self.storage:
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
        return plan.leaving if self.storage else []

    def _gather(
        self, rows: Tensor, heads: Tensor, tokens: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Stored keys and values ``[n, D]``, where they stand now."""
        keys, values = gather(self.storage, rows, heads, tokens)
        if delta is not None:
            turned = self._rotation.rotate(self._full(keys)[None, None], delta[rows, tokens][None])
            keys = self._packed(turned[0, 0])
        return keys, values

    def _index_moved(self, plan: Plan) -> None:
        """Index stored keys anew in rows whose positions have moved."""
        if plan.moves is None or plan.stored is None or plan.stored.delta is None or not self.storage:
            return
        for row in plan.moves.rows:
            if stop := self.storage[row].length:
                keys = self._full(self.storage[row].read()[0][None])
                index = self._policy.index(
                    self._rotation.rotate(keys, plan.stored.delta[row : row + 1, :stop])
                )
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
            self._resize(self._kept_slots, size + -(-lacking // SLOTS) * SLOTS)
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
        start = self.storage[row].length
        self.storage[row].append(keys, values)
        if index is None:
            index = self._policy.index(self._full(keys)[None])[0]
        stop = start + index.shape[1]
        if self.index is None:
            self.index = index.new_zeros(len(self.keys), index.shape[0], 0, index.shape[2])
        if stop > self.index.shape[2]:
            more = max(stop - self.index.shape[2], self.index.shape[2] // 16, SLOTS)
            self.index = functional.pad(self.index, (0, 0, 0, more))
        self.index[row, :, start:stop] = index

    # ---- many new tokens

    def _attend_many(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, **options: Any) -> Tensor:
        reading = plan.reading
        assert reading is not None
        packed_keys = self._with_past(self.keys, self._packed(key), reading)
        packed_values = self._with_past(self.values, self._packed(value), reading)
        before = self._stored_before(reading, plan.moves)
        lossy = bool(self.storage) and self.storage[0].is_lossy
        if not lossy:
            _fill((packed_keys, packed_values), before, reading)
        keys, values = self._full(packed_keys), self._full(packed_values)
        stored = None
        if lossy:
            stored = self.storage[0].as_stored(keys), self.storage[0].as_stored(values)
            _fill(stored, before, reading)
        index = self._policy.index(keys) if self._policy.recall else None
        if index is not None:
            _fill((index,), {row: (self.index[row],) for row in before}, reading)
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

    def _stored_before(self, reading: Reading, moves: Moves | None) -> dict[int, tuple[Tensor, Tensor]]:
        """What was stored in earlier calls, by row: ``[kv heads, n, D]`` twice."""
        found = {}
        for row, tokens in enumerate(reading.stored_before if self.storage else ()):
            if len(tokens):
                keys, values = self.storage[row].read()
                if moves is not None and moves.stored:
                    keys = self._packed(
                        self._rotation.rotate(self._full(keys)[None], moves.stored[row][None])[0]
                    )
                found[row] = keys, values
        return found


def _fill(full: tuple[Tensor, ...], stored: Mapping[int, tuple[Tensor, ...]], reading: Reading) -> None:
    """Write what was stored in earlier calls to its tokens' columns in the layout."""
    for row, parts in stored.items():
        tokens = reading.stored_before[row]
        for tensor, part in zip(full, parts, strict=True):
            tensor[row, :, tokens] = part[:, : len(tokens)]
