"""An LLM whose first and last blocks run at every token, and its middle blocks once per sentence.

A sentence is over when the first token of the next one has been read. Its last token then runs through the middle
blocks, where it attends to the last tokens of earlier sentences, and through the last blocks. From there on, tokens
attend to it in the last blocks. So these have each token as the first blocks leave it, and each finished sentence as
the depth of the whole LLM makes it. The LLM has the weights that it had, and no others.

```text
tokens   t0 t1 t2 | t3 t4 | t5         first blocks: every token
                2       4              middle blocks: the last token of each finished sentence
         t0 t1 t2 2 t3 t4 4 t5         last blocks: both, each attends to what is left of it
```
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sentcompress.contracts.causal_lm import CACHE, additive_mask, sliding_windows
from sentcompress.errors import InputError
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.split_state import BlockCache, Call, SplitState, each, gather

_CACHES = (CACHE, "past_key_values", "layer_past")
"""What blocks call their cache."""
_BY_POSITION = ("position_ids", "position_embeddings")
"""Arguments of blocks with a column for each token."""
_ATTRIBUTE = "_sentence_split"
SPLIT = "split.json"
"""The file that makes the folder of an LLM that of a split one."""


class Finder(Protocol):
    """Finds sentences, as :class:`~sentcompress.text.boundaries.BoundaryFinder` does."""

    def begins(self, sentence: list[int], token: int) -> bool:
        """Whether a token begins a new sentence after these."""


class Split:
    """How an LLM is split. Made by :func:`split`.

    Attributes:
        first, last: how many blocks run at every token, before and after the middle ones.
        finder: finds the sentences.
        has_middle: set to False, the middle blocks are left out: the LLM is pruned.
    """

    def __init__(self, lm: PreTrainedModel, finder: Finder | None, first: int, last: int) -> None:
        self.finder, self.first, self.last = finder, first, last
        self.config = lm.config
        windows, number = sliding_windows(lm.config), len(blocks_of(lm))
        self.windows = [
            windows[kind] for kind in getattr(lm.config, "layer_types", None) or [*windows] * number
        ]
        """The sliding window of each block; None where there is none."""
        self.after = number - last
        """Number of the block after the middle ones."""
        self.has_middle = True
        self._call: Call | None = None
        # Whether blocks return their states in a tuple: the first ones, which always run, show it.
        self._in_tuple = False

    def in_call(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call the LLM without its head.

        Raises:
            InputError: it gets something else than tokens, a mask ``[B, T]`` and its own cache.
        """
        ids, mask, cache = (arguments.get(name) for name in ("input_ids", "attention_mask", CACHE))
        if ids is None:
            raise InputError(
                "a split LLM finds sentences in its tokens", fix="give input_ids, not inputs_embeds"
            )
        if mask is not None and mask.dim() != 2:
            raise InputError("a split LLM makes its own masks", fix="give attention_mask as [B, T]")
        wanted = arguments.get("use_cache")
        if cache is None and (self.config.use_cache if wanted is None else wanted):
            cache = arguments[CACHE] = DynamicCache(config=self.config)
        state = None if cache is None else _state(cache, ids)
        call = self._call = self._begin(ids, mask, state)
        try:
            output = forward(**arguments)
        finally:
            self._call = None
        if cache is not None and state is not None:
            state.valid, state.ranks = call.valid, call.all_ranks
            if cache.layers[-1] is not state:
                cache.layers.append(state)
        return output

    @torch.no_grad()
    def _begin(self, input_ids: Tensor, attention_mask: Tensor | None, state: SplitState | None) -> Call:
        """Find the sentences that the tokens of a call show to be over."""
        finder = self.finder
        assert finder is not None
        (batch, length), device = input_ids.shape, input_ids.device
        state_of = state or SplitState(batch, device)
        past = state_of.get_seq_length()
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -length:]
        ends: list[list[int]] = []
        lasts = state_of.valid[:, -1].tolist() if past else [True] * batch
        rows = zip(state_of.sentences, input_ids.tolist(), new.tolist(), lasts, strict=True)
        for sentence, ids, real, after_token in rows:
            ends.append([])
            for column, token in enumerate(ids):
                if not real[column]:
                    after_token = False
                    continue
                if sentence and not after_token:
                    raise InputError("tokens follow padding on the right", fix="pad on the left")
                after_token = True
                if finder.begins(sentence, token):
                    ends[-1].append(column)  # of the token before: see Call.take
                    sentence.clear()
                sentence.append(token)
        if not self.has_middle:
            ends = [[] for _ in ends]
        count = torch.tensor([len(own) for own in ends], device=device)
        columns = torch.arange(int(count.max()), device=device)
        take = torch.zeros(batch, len(columns), dtype=torch.int64, device=device)
        for row, own in enumerate(ends):
            take[row, : len(own)] = torch.tensor(own, dtype=torch.int64)
        exists = columns < count[:, None]
        before = (state_of.ranks >= 0).sum(1)
        total = int((before + count).max())
        call = Call(
            state=state,
            past=past,
            valid=torch.cat([state_of.valid, new.bool()], 1),
            take=take,
            ranks=(2 * (past + take) - 1).masked_fill(~exists, -1),
            rows=count.nonzero().flatten(),
            slots=torch.where(exists, before[:, None] + columns, total),
            all_ranks=torch.zeros(batch, total, dtype=torch.int64, device=device),
        )
        every = torch.arange(batch, device=device)
        # Counted from 1 meanwhile, so that a slot without a sentence gets -1.
        call.all_ranks = call.put(state_of.ranks[..., None] + 1, call.ranks[..., None] + 1, every)[..., 0] - 1
        return call

    def in_block(self, number: int, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a block with what it has to compute."""
        call = self._call
        if call is None or number < self.first:
            output = forward(**arguments)
            self._in_tuple = isinstance(output, tuple)
            return output
        hidden_states, is_middle = arguments["hidden_states"], number < self.after
        if number == self.first:
            hidden_states = self._enter_middle(call, hidden_states)
        if number == self.after:
            hidden_states = self._leave_middle(call, hidden_states)
        tokens = 0 if is_middle else call.hidden_states.shape[1]
        every = torch.arange(len(call.valid), device=hidden_states.device)
        rows = call.rows if is_middle else every
        own = torch.arange(1, tokens + 1, device=every.device).expand(len(every), -1)
        columns = torch.cat([own, call.take], 1)[rows]
        positions = {name: arguments[name] for name in _BY_POSITION if arguments.get(name) is not None}
        held = call.state.columns.get(number, {}) if call.state is not None else {}
        output = (hidden_states,) if self._in_tuple else hidden_states
        if len(rows):
            changed = {
                name: call.columns(held.get(name), value, columns, rows) for name, value in positions.items()
            }
            cache = None if call.state is None else BlockCache(call, tokens, rows)
            changed |= {name: cache for name in _CACHES if name in arguments}
            changed["attention_mask"] = self._mask(call, number, tokens, hidden_states.dtype)
            output = forward(**(arguments | changed | {"hidden_states": hidden_states}))
        if call.state is not None:
            call.state.columns[number] = {
                name: each(lambda tensor: tensor[:, -1:], value) for name, value in positions.items()
            }
        if number == len(self.windows) - 1:
            return (output[0][:, :tokens], *output[1:]) if isinstance(output, tuple) else output[:, :tokens]
        return output

    def _enter_middle(self, call: Call, hidden_states: Tensor) -> Tensor:
        """``[B, N, H]`` of tokens to ``[b, S, H]`` of the last tokens of finished sentences."""
        before = None if call.state is None else call.state.hidden_states
        whole = torch.cat([hidden_states[:, :1] if before is None else before, hidden_states], 1)
        call.hidden_states = hidden_states
        if call.state is not None:
            call.state.hidden_states = hidden_states[:, -1:]
        return gather(whole[call.rows], call.take[call.rows])

    def _leave_middle(self, call: Call, hidden_states: Tensor) -> Tensor:
        """``[b, S, H]`` of finished sentences to ``[B, N + S, H]``, with the tokens before them."""
        entries = hidden_states.new_zeros(*call.take.shape, hidden_states.shape[-1])
        return torch.cat([call.hidden_states, entries.index_copy(0, call.rows, hidden_states)], 1)

    def _mask(self, call: Call, number: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """The additive mask of a block: ``[B, 1, N + S, T + C]``, or ``[b, 1, S, C]`` for one in the middle."""
        kind = bool(tokens), self.windows[number]
        if kind in call.masks:
            return call.masks[kind]
        keys, queries = call.all_ranks, call.ranks
        exists = keys >= 0
        if tokens:
            order = 2 * torch.arange(call.past + tokens, device=keys.device).expand(len(keys), -1)
            keys, exists = torch.cat([order, keys], 1), torch.cat([call.valid, exists], 1)
            queries = torch.cat([order[:, call.past :], queries], 1)
        else:
            keys, exists, queries = keys[call.rows], exists[call.rows], queries[call.rows]
        allowed = exists[:, None, :] & (keys[:, None, :] <= queries[:, :, None])
        if (window := self.windows[number]) is not None:
            allowed &= queries[:, :, None] // 2 - keys[:, None, :] // 2 < window
        call.masks[kind] = additive_mask(allowed[:, None], dtype)
        return call.masks[kind]


def split(lm: PreTrainedModel, finder: Finder | None, first: int, last: int) -> Split:
    """Run the middle blocks of an LLM once per sentence from now on.

    Args:
        finder: finds its sentences; None if it only has to have the shape.
        first, last: how many blocks run at every token; at least one each.

    Raises:
        InputError: no block is left for the middle, or the LLM cannot be split there, or is split already.
    """
    if split_of(lm) is not None:
        raise InputError("graft.split: this LLM is split already", fix="load it again")
    blocks = blocks_of(lm)
    number = len(blocks)
    if min(first, last) < 1 or first + last >= number:
        raise InputError(
            f"graft.split: {first} first and {last} last of {number} blocks leave no middle",
            fix=f"choose at least 1 each, and at most {number - 1} together",
        )
    kinds = getattr(lm.config, "layer_types", None) or [""] * number
    if missing := {*kinds[first:]} - {*kinds[:first]}:
        # transformers takes the length of the text from the first block of each kind.
        raise InputError(
            f"graft.split: the first {first} blocks have none of the kind {', '.join(sorted(missing))}",
            fix=f"choose at least {max(map(kinds.index, missing)) + 1} first blocks",
        )
    made = Split(lm, finder, first, last)
    for index, block in enumerate(blocks):
        _replace_forward(block, functools.partial(made.in_block, index))
    # The module around the blocks: OPT's base model is around that one, and its causal LM goes past it.
    _replace_forward(next(m for m in lm.modules() if any(c is blocks for c in m.children())), made.in_call)
    lm._is_stateful = True  # transformers then refuses to take back tokens
    lm.supports_gradient_checkpointing = False  # what blocks compute depends on the call
    setattr(lm, _ATTRIBUTE, made)
    return made


def split_of(lm: Any) -> Split | None:
    """How an LLM is split; None if it is not."""
    return getattr(lm, _ATTRIBUTE, None)


def _replace_forward(module: Any, call: Callable[..., Any]) -> None:
    """Have ``call(forward, arguments)`` answer in place of a module's forward."""
    forward = module.forward
    names = [*inspect.signature(forward).parameters]
    # Not a closure, which a copy of the LLM would share with it.
    module.forward = functools.update_wrapper(functools.partial(_replaced, call, forward, names), forward)


def _replaced(call: Callable[..., Any], forward: Any, names: list[str], /, *args: Any, **kwargs: Any) -> Any:
    return call(forward, kwargs | dict(zip(names, args, strict=False)))


def _state(cache: Any, input_ids: Tensor) -> SplitState:
    """The state in a cache, a new one for an empty cache. Raises InputError for another cache."""
    if not isinstance(cache, DynamicCache):
        raise InputError(
            f"a split LLM keeps a cache of its own kind, but got {type(cache).__name__}", fix="leave it out"
        )
    if cache.layers and isinstance(cache.layers[-1], SplitState):
        return cache.layers[-1]
    if cache.get_seq_length():
        raise InputError("this cache was filled by an LLM that is not split", fix="start with an empty one")
    return SplitState(len(input_ids), input_ids.device)
