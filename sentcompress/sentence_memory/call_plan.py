"""What one call of an LLM does to the cache of each block: decided once, the same for all blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sentcompress.sentence_memory.visibility import Layout, Masks


@dataclass(frozen=True)
class Stored:
    """The stored tokens of all rows, ``[B, n]``.

    Attributes:
        sentence: numbers of their sentences; those of a row are numbered from 0 as they were stored.
        out_of_reach: fp32, minus infinity for padding and for tokens that are in the cache anyway, 0 for all others.
        position: tokens of the text before each.
        sentences: numbers of sentences are below this.
        delta: how far each has to move from where it was stored; None if none has.
    """

    sentence: Tensor
    out_of_reach: Tensor
    position: Tensor
    sentences: int
    delta: Tensor | None = None


@dataclass(frozen=True)
class Moves:
    """How re-indexed positions move in a call.

    Attributes:
        rows: those whose positions move down in it.
        slots: one token: how far the token in each slot moves, ``[B, R]``; None if none moves.
        stored: several tokens: how far the stored tokens of each row have to move to where they stood before the call;
            empty if none has to.
        spans: several tokens, if a row moves: begin and end of new tokens between which positions do not move, and how
            far each token of the layout up to that end moves for them, ``[B, past + end]``; the last is for all tokens.
    """

    rows: list[int]
    slots: Tensor | None = None
    stored: list[Tensor] = field(default_factory=list)
    spans: list[tuple[int, int, Tensor]] = field(default_factory=list)


@dataclass
class Reading:
    """What a call with several tokens adds to its :class:`Plan`.

    Attributes:
        layout: ``past`` columns of earlier tokens (a row's come first, then padding), then the new ones.
        before: for each row the slots that were in use before, and the tokens in them.
        stored_before: for each row the tokens that were stored before.
        columns: the column of the token in each slot, ``[B, R]``; 0 for a free one.
        masks: what the tokens see, made by the first block.
    """

    layout: Layout
    past: int
    before: list[tuple[Tensor, Tensor]]
    stored_before: list[Tensor]
    columns: Tensor
    masks: Masks = field(default_factory=dict)


@dataclass
class Plan:
    """What one call of the LLM does to the cache of each block. Tensors lie on the CPU until a block asks for them.

    Attributes:
        leaving: rows and their tokens that are stored, in order: the slots where they are (one token), or their columns
            in the layout (several tokens).
        slots: ``[B, R]`` tokens in the slots after the call; -1 in a free one.
        position: ``[B, Q]`` of the new tokens; -1 for padding.
        stored: after ``leaving`` left; None if nothing is stored.
        new_slots: one token: its slot in each row, ``[B]``.
        reading: several tokens; None if there is one.
        moves: how re-indexed positions move in this call; None if none does.
        attended: one token: the slots that it attended to in each block so far, bool ``[B, kv heads or 1, slots]``.
    """

    leaving: list[tuple[int, Tensor]]
    slots: Tensor
    position: Tensor
    stored: Stored | None
    new_slots: Tensor | None = None
    reading: Reading | None = None
    moves: Moves | None = None
    attended: list[Tensor] = field(default_factory=list)
    _moved: dict[torch.device, Plan] = field(default_factory=dict)

    def on(self, device: torch.device) -> Plan:
        """The plan with its tensors on a device."""
        if device.type == "cpu":
            return self
        if device not in self._moved:
            fields = {name: _to(getattr(self, name), device) for name in _FIELDS}
            self._moved[device] = Plan(**fields, attended=self.attended)
        return self._moved[device]

    @cached_property
    def seen(self) -> Tensor:
        """Slots that hold a token: bool ``[B, 1, R]``."""
        return (self.slots >= 0)[:, None]

    @cached_property
    def own_slots(self) -> tuple[Any, ...]:
        """One token: where the new tokens go in keys or values ``[B, heads, R, D]``."""
        return torch.arange(len(self.slots), device=self.slots.device), slice(None), self.new_slots


_FIELDS = tuple(name for name in Plan.__dataclass_fields__ if name not in ("attended", "_moved"))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {}  # masks are made on each device
    if isinstance(value, Layout | Stored | Moves | Reading):
        return type(value)(**{name: _to(part, device) for name, part in vars(value).items()})
    return value
