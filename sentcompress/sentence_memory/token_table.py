"""Which tokens of a batch are kept, where, and which are stored: the same for all blocks of an LLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sentcompress.contracts import Tokens
from sentcompress.errors import InputError
from sentcompress.sentence_memory.call_plan import Moves, Plan, Reading, Stored
from sentcompress.sentence_memory.policy import Policy
from sentcompress.sentence_memory.positions import (
    Reindexing,
    effective_position,
    moved_position,
    moves_before,
)
from sentcompress.sentence_memory.visibility import Layout
from sentcompress.text.boundaries import BoundaryFinder

SLOTS = 32
"""The cache grows by this many tokens at a time."""


ROW = ("ids", "starts", "slots", "stored", "stored_at")
"""What a :class:`Row` is made of."""


class Row:
    """One text of a batch.

    Attributes:
        ids: all its token ids.
        starts: numbers of the tokens that begin a sentence.
        slots: the token in each slot of the cache; -1 in a free one.
        stored: numbers of the tokens in slow storage, in its order: whole sentences.
        stored_at: their positions when they were stored, which their keys are rotated to.
        moves: how often positions have moved down.
        stored_sentences: for each token in slow storage the number of its sentence, from 0 as they were stored.
        out_of_reach: for each, minus infinity if it is in the cache anyway, else 0.
    """

    def __init__(self, reindexing: Reindexing | None = None) -> None:
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.slots = np.full(0, -1)
        self.stored = np.zeros(0, dtype=np.int64)
        self.stored_at = np.zeros(0, dtype=np.int64)
        self.moves = 0
        self.note_stored()
        self._reindexing = reindexing
        self._stored_sentences: set[int] = set()

    def append(self, token: int, finder: BoundaryFinder) -> bool:
        """Add a token; whether it begins a sentence."""
        begins = not self.starts or finder.begins(self.ids[self.starts[-1] :], token)
        if begins:
            self.starts.append(len(self.ids))
        self.ids.append(token)
        if self._reindexing is not None:
            self.moves = self._reindexing.moves(len(self.ids) - 1)
        return begins

    def positions(self, tokens: np.ndarray, moves: int | None = None) -> np.ndarray:
        """Positions that keys of tokens are rotated to, now or after another number of moves."""
        moves = self.moves if moves is None else moves
        if self._reindexing is None or not moves:
            return tokens
        offsets = tokens - np.asarray(self.starts, dtype=np.int64)[self.sentences(tokens)]
        return self._reindexing.positions(tokens, offsets, moves)

    def sentences(self, tokens: np.ndarray) -> np.ndarray:
        """Numbers of the sentences that tokens are in."""
        return np.searchsorted(self.starts, tokens, side="right") - 1

    def layout(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of :class:`Layout` for some tokens."""
        sentence = self.sentences(tokens)
        starts = np.asarray(self.starts, dtype=np.int64)
        ends = np.append(starts[1:], len(self.ids))
        return {
            "ids": np.asarray(self.ids, dtype=np.int64)[tokens],
            "position": tokens,
            "sentence": sentence,
            "offset": tokens - starts[sentence],
            "behind": ends[sentence] - 1 - tokens,
        }

    def dropped(self, tokens: np.ndarray, policy: Policy) -> np.ndarray:
        """Which of these tokens a policy does not keep now: bool."""
        fields = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in self.layout(tokens).items()}
        age = len(self.starts) - 1 - fields.pop("sentence")
        distance = self.starts[-1] - fields["position"] + fields["offset"]
        kept = policy.keep(Tokens(age=age, distance=distance, **fields)) | (age == 0)
        return ~kept.expand(len(tokens)).numpy()

    def stored_spans(self, times: np.ndarray) -> dict[tuple[int, int], int]:
        """First and last token (exclusive) of sentences in slow storage, each with its largest number of times.

        Args:
            times: for each token in slow storage; sentences whose tokens all have 0 are left out.
        """
        places = np.flatnonzero(times)
        most: dict[int, int] = {}
        sentences = self.sentences(self.stored[places]).tolist()
        for sentence, number in zip(sentences, times[places].tolist(), strict=True):
            most[sentence] = max(number, most.get(sentence, 0))
        ends = [*self.starts[1:], len(self.ids)]
        return {(self.starts[s], ends[s]): most[s] for s in sorted(most)}

    def store(self, dropped: np.ndarray) -> np.ndarray:
        """The tokens that have to be stored when these are dropped: their whole sentences, in order."""
        new = [s for s in np.unique(self.sentences(dropped)).tolist() if s not in self._stored_sentences]
        self._stored_sentences.update(new)
        ends = [*self.starts[1:], len(self.ids)]
        tokens = np.asarray([t for s in new for t in range(self.starts[s], ends[s])], dtype=np.int64)
        self.stored = np.append(self.stored, tokens)
        self.stored_at = np.append(self.stored_at, self.positions(tokens))
        return tokens

    def note_stored(self) -> None:
        """Bring what is known of the tokens in slow storage up to date, after tokens were stored or dropped."""
        self.stored_sentences = np.unique(self.sentences(self.stored), return_inverse=True)[1]
        self.out_of_reach = np.where(np.isin(self.stored, self.slots), -np.inf, 0).astype(np.float32)


class TokenTable:
    """The texts of a batch. :meth:`read` takes new tokens and plans what the cache of each block does.

    Args:
        full_prompts: tokens that are read in one call see each other in full; None: only those of a prompt do, where
            positions do not move.

    Attributes:
        in_prompt: a prompt is being read.
    """

    def __init__(
        self,
        policy: Policy,
        finder: BoundaryFinder,
        reindexing: Reindexing | None = None,
        full_prompts: bool | None = None,
    ) -> None:
        self.policy, self.finder, self.reindexing = policy, finder, reindexing
        self.full_prompts = full_prompts
        self.in_prompt = False
        self.rows: list[Row] = []
        self.plan: Plan | None = None
        """Of the current call."""
        self._stored: Stored | None = None

    def state(self) -> dict[str, Tensor]:
        """The only row, as int64 tensors."""
        row = self.rows[0]
        return {name: torch.tensor(np.asarray(getattr(row, name)).astype(np.int64)) for name in ROW}

    def load_state(self, state: dict[str, Tensor], rows: int) -> None:
        """Begin each of ``rows`` rows with what :meth:`state` returned."""
        self.rows = [Row(self.reindexing) for _ in range(rows)]
        for row in self.rows:
            row.ids, row.starts = state["ids"].tolist(), state["starts"].tolist()
            row.slots, row.stored, row.stored_at = (
                state[name].numpy().copy() for name in ("slots", "stored", "stored_at")
            )
            if self.reindexing is not None and row.ids:
                row.moves = self.reindexing.moves(len(row.ids) - 1)
            row._stored_sentences = set(row.sentences(row.stored).tolist())
            row.note_stored()
        self._stored = self._stored_now()

    def select(self, rows: Sequence[int]) -> None:
        """Only keep some rows."""
        self.rows = [self.rows[row] for row in rows]
        self._stored = self._stored_now()

    def join(self, rows: Sequence[Row]) -> None:
        """Add rows that another table has read."""
        self.rows += rows
        self._stored = self._stored_now()

    @property
    def reads_in_full(self) -> bool:
        """Tokens of this call see each other in full."""
        prompt = self.in_prompt and self.planned().moves is None
        return prompt if self.full_prompts is None else self.full_prompts

    @property
    def capacity(self) -> int:
        """Slots of the cache."""
        return max((len(row.slots) for row in self.rows), default=0)

    def planned(self) -> Plan:
        """The plan of the current call.

        Raises:
            InputError: there is none, since the LLM has not announced its tokens.
        """
        if self.plan is None:
            raise InputError(
                "this LLM is not the one that the memory was made for",
                fix="make one for this LLM: SentenceMemory(model, tokenizer)",
            )
        return self.plan

    def read(self, ids: list[list[int]], valid: list[list[bool]]) -> None:
        """Plan a call with the next tokens of each row, ``[B, Q]``; where ``valid`` is false there is padding."""
        one = bool(self.rows) and all(len(row) == 1 and row[0] for row in valid)
        if not self.rows:
            self.rows = [Row(self.reindexing) for _ in ids]
        self.plan = self._read_one([row[0] for row in ids]) if one else self._read_many(ids, valid)

    def _read_one(self, ids: list[int]) -> Plan:
        leaving, new_slots = [], []
        changed = False
        moved: list[int] = []
        slot_moves: Tensor | None = None
        capacity = self.capacity  # another row may add to it below
        for number, (row, token) in enumerate(zip(self.rows, ids, strict=True)):
            moves = row.moves
            begins = row.append(token, self.finder)
            if row.moves > moves:
                changed = True
                moved.append(number)
                if slot_moves is None:
                    slot_moves = torch.zeros(len(ids), capacity, dtype=torch.long)
                used = np.flatnonzero(row.slots >= 0)
                held = row.slots[used]
                slot_moves[number, used] = torch.from_numpy(row.positions(held) - row.positions(held, moves))
            if begins:
                changed = True
                used = np.flatnonzero(row.slots >= 0)
                used = used[row.dropped(row.slots[used], self.policy)]
                dropped = row.slots[used]
                if self.policy.recall and len(dropped):
                    tokens = row.store(dropped)
                    if len(tokens):
                        place = {token: slot for slot, token in enumerate(row.slots.tolist())}
                        leaving.append((number, torch.tensor([place[t] for t in tokens.tolist()])))
                row.slots[used] = -1
                row.note_stored()
            new_slots.append(self._free_slot(row))
            row.slots[new_slots[-1]] = len(row.ids) - 1
        if changed:
            self._stored = self._stored_now()
        return Plan(
            leaving=leaving,
            slots=self._slots(),
            position=torch.tensor([[len(row.ids) - 1] for row in self.rows]),
            new_slots=torch.tensor(new_slots),
            stored=self._stored,
            moves=Moves(moved, slots=slot_moves) if moved else None,
        )

    def _free_slot(self, row: Row) -> int:
        free = np.flatnonzero(row.slots < 0)
        if not len(free):
            row.slots = np.append(row.slots, np.full(SLOTS, -1))
            return len(row.slots) - SLOTS
        return int(free[0])

    def _read_many(self, ids: list[list[int]], valid: list[list[bool]]) -> Plan:
        past = max(len(row.ids) for row in self.rows)
        before = []
        old_moves = [row.moves for row in self.rows]
        stored_moves = self._stored_moves()
        stored_before = [torch.from_numpy(row.stored) for row in self.rows]
        columns = []
        for row, new, real in zip(self.rows, ids, valid, strict=True):
            used = np.flatnonzero(row.slots >= 0)
            before.append((torch.from_numpy(used), torch.from_numpy(row.slots[used])))
            place = [*range(len(row.ids)), *[-1] * (past - len(row.ids))]
            for token, is_real in zip(new, real, strict=True):
                place.append(len(row.ids) if is_real else -1)
                if is_real:
                    row.append(token, self.finder)
            columns.append(np.asarray(place, dtype=np.int64))
        layout = self._layout(columns)
        leaving = []
        for number, (row, where, (_, held)) in enumerate(zip(self.rows, columns, before, strict=True)):
            there = np.union1d(held.numpy(), where[past:][where[past:] >= 0])
            dropped = row.dropped(there, self.policy) if len(there) else np.zeros(0, bool)
            if self.policy.recall and dropped.any():
                tokens = row.store(there[dropped])
                column = {token: c for c, token in enumerate(where.tolist()) if token >= 0}
                leaving.append((number, torch.tensor([column[t] for t in tokens.tolist()], dtype=torch.long)))
            kept = there[~dropped]
            row.slots = np.full(-(-(len(kept) + 1) // SLOTS) * SLOTS, -1)
            row.slots[: len(kept)] = kept
            row.note_stored()
        slots = self._slots()
        self._stored = self._stored_now()
        moved = [n for n, (row, old) in enumerate(zip(self.rows, old_moves, strict=True)) if row.moves > old]
        spans = self._spans(layout, past, old_moves) if moved else []
        return Plan(
            moves=Moves(moved, stored=stored_moves, spans=spans) if moved or stored_moves else None,
            leaving=leaving,
            slots=slots,
            position=layout.position[:, past:],
            stored=self._stored,
            reading=Reading(layout, past, before, stored_before, self._columns(slots, columns)),
        )

    def _stored_moves(self) -> list[Tensor]:
        """How far the stored tokens of each row have to move to where they stand now; empty if none has to."""
        moves = [torch.from_numpy(row.positions(row.stored) - row.stored_at) for row in self.rows]
        return moves if any(bool(row.any()) for row in moves) else []

    def _spans(self, layout: Layout, past: int, old_moves: list[int]) -> list[tuple[int, int, Tensor]]:
        """:attr:`Moves.spans`. Earlier tokens stand where they stood before the call, new ones where they were read."""
        assert self.reindexing is not None
        new, limit = layout.position[:, past:], self.reindexing.limit
        moves = moves_before(new, limit).cummax(1).values  # padding moves nothing
        moves = torch.maximum(moves, torch.tensor(old_moves)[:, None])
        ends = (moves.diff() > 0).any(0).nonzero().flatten() + 1
        bounds = [0, *ends.tolist(), moves.shape[1]]
        first = layout.position.clone()
        first[:, past:] = effective_position(new, limit)
        for number, old in enumerate(old_moves):
            first[number, :past] = self._positions(layout, number, past, torch.tensor(old))
        spans = []
        for start, stop in pairwise(bounds):
            now = torch.stack(
                [self._positions(layout, n, past + stop, row[stop - 1]) for n, row in enumerate(moves)]
            )
            spans.append((start, stop, now - first[:, : past + stop]))
        return spans

    def _positions(self, layout: Layout, row: int, stop: int, moves: Tensor) -> Tensor:
        """Where the first tokens of a row of a layout stand after some moves."""
        assert self.reindexing is not None
        token, offset = layout.position[row, :stop], layout.offset[row, :stop]
        return moved_position(token, offset, moves, self.reindexing.limit, self.reindexing.sinks)

    @staticmethod
    def _columns(slots: Tensor, columns: list[np.ndarray]) -> Tensor:
        """Where the tokens in the slots stand in a layout with these tokens in its columns."""
        found = torch.zeros_like(slots)
        for row, (held, where) in enumerate(zip(slots, columns, strict=True)):
            used = held >= 0
            column = np.zeros(int(where.max(initial=-1)) + 1, dtype=np.int64)
            column[where[where >= 0]] = np.flatnonzero(where >= 0)
            found[row, used] = torch.from_numpy(column)[held[used]]
        return found

    def _layout(self, columns: list[np.ndarray]) -> Layout:
        fields: dict[str, list[np.ndarray]] = {}
        for row, where in zip(self.rows, columns, strict=True):
            real = where >= 0
            values = row.layout(where[real])
            for name in ("ids", "position", "sentence", "offset", "behind"):
                column = np.full(len(where), -1 if name == "position" else 0)
                column[real] = values[name]
                fields.setdefault(name, []).append(column)
        tensors = {name: torch.from_numpy(np.stack(values)) for name, values in fields.items()}
        # Padding joins the sentence before it, so that sentences stand together.
        tensors["sentence"] = tensors["sentence"].cummax(1).values
        return Layout(**tensors, text=torch.zeros_like(tensors["ids"]))

    def _slots(self) -> Tensor:
        slots = np.full((len(self.rows), self.capacity), -1)
        for number, row in enumerate(self.rows):
            slots[number, : len(row.slots)] = row.slots
        return torch.from_numpy(slots)

    def _stored_now(self) -> Stored | None:
        length = max((len(row.stored) for row in self.rows), default=0)
        if not length:
            return None
        sentence = np.zeros((len(self.rows), length), dtype=np.int64)
        out_of_reach = np.full((len(self.rows), length), -np.inf, dtype=np.float32)
        position = np.zeros((len(self.rows), length), dtype=np.int64)
        for number, row in enumerate(self.rows):
            count = len(row.stored)
            sentence[number, :count] = row.stored_sentences
            out_of_reach[number, :count] = row.out_of_reach
            position[number, :count] = row.stored
        return Stored(
            sentence=torch.from_numpy(sentence),
            out_of_reach=torch.from_numpy(out_of_reach),
            position=torch.from_numpy(position),
            sentences=int(sentence.max()) + 1,
            delta=pad_sequence(moves, batch_first=True) if (moves := self._stored_moves()) else None,
        )
