"""What a call of a split LLM computes, and what is kept of the texts until the next call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sentcompress.errors import InputError


class SplitState(CacheLayerMixin):
    """What is kept of texts between calls. It is one more layer of their cache.

    Attributes:
        sentences: for each text, the tokens of its current sentence.
        valid: ``[B, T]`` bool, which tokens are not padding.
        ranks: ``[B, C]`` int64, as in :class:`Call`, of the sentences that are over.
        hidden_states: ``[B, 1, H]`` of the last token, before the middle blocks.
        columns: by block, the position arguments of the last token.
        tokens, entries: by block, keys and values ``[B, heads, T or C, D]`` of tokens, and of sentences that are over.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, batch: int, device: torch.device) -> None:
        super().__init__()
        self.sentences: list[list[int]] = [[] for _ in range(batch)]
        self.valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.ranks = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.hidden_states: Tensor | None = None
        self.columns: dict[int, dict[str, Any]] = {}
        self.tokens: dict[int, tuple[Tensor, Tensor]] = {}
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the blocks fill it."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Never called: this layer belongs to no block."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.valid.shape[1]

    def get_max_length(self) -> int:
        return -1

    def crop(self, *_: Any) -> None:
        """Raises InputError: sentences would have to become unfinished again."""
        raise InputError("a split LLM cannot take back tokens", fix="leave out assisted decoding")

    def reset(self) -> None:
        self.__init__(len(self.sentences), self.valid.device)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(self._rows()[indices])

    def _rows(self) -> Tensor:
        return torch.arange(len(self.sentences), device=self.valid.device)

    def _take(self, rows: Tensor) -> None:
        """Keep these texts, in this order."""
        self.sentences = [[*self.sentences[row]] for row in rows.tolist()]
        self.valid, self.ranks = self.valid[rows], self.ranks[rows]
        if self.hidden_states is not None:
            self.hidden_states = self.hidden_states[rows]
        for own in self.columns.values():
            for name, value in own.items():
                own[name] = each(lambda tensor: tensor[rows] if len(tensor) > 1 else tensor, value)
        for held in (self.tokens, self.entries):
            for block, pair in held.items():
                held[block] = pair[0][rows], pair[1][rows]


@dataclass
class Call:
    """One call of a split LLM, in which sentences turn out to be over: at most S in a text.

    Attributes:
        state: None without a cache.
        past: number of tokens before this call.
        valid: ``[B, T]`` bool, of all tokens so far.
        take: ``[B, S]`` int64, columns of these sentences' last tokens: 0 is the last token before this call, 1 the
            first in it.
        ranks: ``[B, S]`` int64, where these sentences are in the order of the text: token ``n`` has rank ``2n``, the
            sentence that ends with it ``2n + 1``. -1 if the text has fewer of them.
        rows: numbers of the texts with such a sentence.
        slots: ``[B, S]`` int64, where they are kept among all C sentences of their text that are over.
        all_ranks: ``[B, C]`` int64, of all these.
        hidden_states: ``[B, N, H]`` of the call's tokens, before the middle blocks.
        masks: by block kind, made when first needed.
    """

    state: SplitState | None
    past: int
    valid: Tensor
    take: Tensor
    ranks: Tensor
    rows: Tensor
    slots: Tensor
    all_ranks: Tensor
    hidden_states: Tensor = field(init=False)
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def put(self, before: Tensor | None, new: Tensor, rows: Tensor) -> Tensor:
        """Add what belongs to the call's sentences to what belongs to those before.

        Args:
            before: ``[B, ..., C', D]``; None if there were none.
            new: ``[b, ..., S, D]``, of some of the texts.
            rows: their numbers ``[b]``.

        Returns:
            ``[B, ..., C, D]``.
        """
        total = self.all_ranks.shape[1]
        # One more slot takes what belongs to no sentence.
        whole = new.new_zeros(len(self.valid), *new.shape[1:-2], total + 1, new.shape[-1])
        if before is not None:
            kept = before[..., :total, :]  # the texts with most sentences may be gone from the batch
            whole[..., : kept.shape[-2], :] = kept
        slots = self.slots[rows].view(len(rows), *[1] * (new.dim() - 3), -1, 1).expand_as(new)
        whole[rows] = whole[rows].scatter(-2, slots, new)
        return whole[..., :total, :]

    def columns(self, held: Any, value: Any, columns: Tensor, rows: Tensor) -> Any:
        """Some columns of an argument of a block.

        Args:
            held: its last column before this call; None if there was none.
            value: ``[1 or B, N, ...]``, or several such tensors.
            columns: ``[b, n]``, numbered as in ``take``.
            rows: numbers of the texts ``[b]``.

        Returns:
            ``[b, n, ...]`` of each tensor.
        """

        def taken(tensor: Tensor, before: Tensor) -> Tensor:
            most = max(len(before), len(tensor))
            whole = torch.cat([t.expand(most, *t.shape[1:]) for t in (before, tensor)], 1)
            return gather(whole.expand(len(self.valid), *whole.shape[1:])[rows], columns)

        before = each(lambda tensor: tensor[:, :1], value) if held is None else held
        if isinstance(value, Tensor):
            return taken(value, before)
        return type(value)(map(taken, value, before))


class BlockCache:
    """Stands for the cache in a call of a block: keeps new keys and values, and returns all that can be attended to.

    Args:
        tokens: how many of the new ones belong to tokens; the others belong to finished sentences.
        rows: numbers of the texts that the block computes.
    """

    def __init__(self, call: Call, tokens: int, rows: Tensor) -> None:
        self.call, self.tokens, self.rows = call, tokens, rows

    def update(self, key: Tensor, value: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """``[b, heads, N + S, D]`` to ``[b, heads, T + C, D]``, twice; no tokens in middle blocks."""
        state = self.call.state
        assert state is not None
        new = [tensor[:, :, self.tokens :] for tensor in (key, value)]
        before: Any = state.entries.get(block, (None, None))
        pair = [self.call.put(*both, self.rows) for both in zip(before, new, strict=True)]
        state.entries[block] = pair[0], pair[1]
        pair = [tensor[self.rows] for tensor in pair]
        if self.tokens:
            new = [tensor[:, :, : self.tokens] for tensor in (key, value)]
            if block in state.tokens:
                new = [torch.cat(both, 2) for both in zip(state.tokens[block], new, strict=True)]
            state.tokens[block] = new[0], new[1]
            pair = [torch.cat(both, 2) for both in zip(new, pair, strict=True)]
        return tuple(pair)

    def get_seq_length(self, *_: Any) -> int:
        return self.call.past


def gather(values: Tensor, columns: Tensor) -> Tensor:
    """``[B, n, ...]`` of ``[B, N, ...]`` by ``columns`` ``[B, n]``."""
    return values[torch.arange(len(values), device=values.device)[:, None], columns]


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change a tensor, or each of several."""
    return change(value) if isinstance(value, Tensor) else type(value)(map(change, value))
